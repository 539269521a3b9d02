"""The last block of joined ones makes only the states that are read: same loss and gradients, less work."""

import math
from typing import Any

import pytest
import torch
from tests.models.test_fused import CPU, assert_close, make_batch, make_family, make_model, step
from torch.utils.flop_counter import FlopCounterMode

from kajiya.config.options import NextTokenLoss
from kajiya.data.batch import NO_TARGET, Batch, target_places
from kajiya.models import hidden
from kajiya.models.fused import fuse_blocks
from kajiya.models.future import add_future_heads
from kajiya.models.hidden import all_logits, hidden_at, last_hidden
from kajiya.models.native.library import native_problem
from kajiya.training.losses.next_token import next_token
from kajiya.training.losses.sequences import token_log_probs
from kajiya.training.recompute import recompute_activations

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="no C++ compiler")


def with_answers(batch: Batch) -> Batch:
    """The batch with targets in the last two fifths of each segment alone."""
    targets = batch.targets.clone()
    for row, segments in enumerate(batch.segments):
        for segment in segments.unique():
            places = (segments == segment).nonzero().flatten()
            targets[row, places[: math.ceil(0.6 * len(places))]] = NO_TARGET
    return Batch(batch.tokens, targets, batch.positions, batch.segments, int((targets >= 0).sum()))


def adapted(targets: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return get_peft_model(make_model(), config).get_base_model()


MODELS = {
    "llama": make_model,
    "mistral": lambda: make_model("mistral", sliding_window=None),
    "qwen2": lambda: make_family("qwen2"),
    "gemma3": lambda: make_family("gemma3"),
    "attention adapted": lambda: adapted(["q_proj", "k_proj", "v_proj", "o_proj"]),
    "all adapted": lambda: adapted("all-linear"),
    "some adapted": lambda: adapted(["k_proj", "down_proj"]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("recompute", ["off", "full", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers(name: str, recompute: str) -> None:
    batch, plain, model = with_answers(make_batch()), MODELS[name](), MODELS[name]()
    plain.set_attn_implementation("eager")
    wanted_loss, wanted = step(plain, batch)
    recompute_activations(model, recompute, CPU)
    assert fuse_blocks(model, torch.float32, CPU, is_autocast=False).startswith("yes")
    with FlopCounterMode(display=False) as counted:
        loss, grads = step(model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert grads.keys() == wanted.keys() != set()
    for each, grad in grads.items():
        assert_close(grad, wanted[each], 1e-4)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as whole:
        patch.setattr(hidden, "_MOST_PLACES", 0.0)
        step(model, batch)
    assert counted.get_total_flops() < 0.85 * whole.get_total_flops()  # one of two blocks, two fifths of its states


def test_bf16_states_are_those_of_the_whole_pass() -> None:
    model, batch = make_model(dtype=torch.bfloat16), with_answers(make_batch())
    assert fuse_blocks(model, torch.bfloat16, CPU, is_autocast=False).startswith("yes")
    places = target_places(batch.targets)
    with torch.no_grad():
        assert_close(hidden_at(model, batch, places), last_hidden(model, batch).flatten(0, 1)[places], 1e-2)
    _, grads = step(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "_MOST_PLACES", 0.0)
        _, wanted = step(model, batch)
    for name, grad in grads.items():
        assert_close(grad, wanted[name], 5e-2)


def test_log_probs_and_their_gradients_are_those_of_the_whole_pass() -> None:
    """What DPO and the other losses over sequences are made of."""
    model, batch = make_model(), with_answers(make_batch())
    assert fuse_blocks(model, torch.float32, CPU, is_autocast=False).startswith("yes")
    found = []
    for most in (0.9, 0.0):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hidden, "_MOST_PLACES", most)
            values_BT = token_log_probs(model, batch, 40)
        (values_BT * torch.linspace(-1, 2, values_BT.numel()).view_as(values_BT)).sum().backward()
        found.append([values_BT, *(p.grad for p in model.parameters())])
    for ours, whole in zip(*found, strict=True):
        assert_close(ours, whole, 1e-5)


def test_a_batch_without_targets_gives_no_gradient() -> None:
    model, batch = make_model(), make_batch()
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    empty = Batch(batch.tokens, torch.full_like(batch.targets, NO_TARGET), batch.positions, batch.segments, 0)
    terms, _ = next_token(model, empty, NextTokenLoss())
    terms["loss"][0].backward()
    assert float(terms["loss"][0].detach()) == 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_noise_on_embeddings_goes_the_same_way() -> None:
    model, batch = make_model(), with_answers(make_batch())
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    losses = []
    for most in (0.9, 0.0):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hidden, "_MOST_PLACES", most)
            terms, _ = next_token(model, batch, NextTokenLoss(neftune_alpha=5.0))
        losses.append(float(terms["loss"][0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_all_states_are_there_for_whatever_else_reads_them() -> None:
    model, batch = make_model(), with_answers(make_batch())
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    assert last_hidden(model, batch).shape[:2] == batch.tokens.shape
    assert all_logits(model, batch).shape[:2] == batch.tokens.shape
    add_future_heads(model, 1)
    next_token(model, batch, NextTokenLoss())  # its heads read every state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "is_fused", lambda _model: pytest.fail("asked for some places alone"))
        next_token(model, batch, NextTokenLoss())


def test_a_block_that_falls_back_to_transformers_gives_the_same_places() -> None:
    model, batch = make_model(), with_answers(make_batch())
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    places = target_places(batch.targets)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hidden_at(model, batch, places), last_hidden(model, batch).flatten(0, 1)[places])


def test_a_model_that_is_not_joined_gives_the_same_places() -> None:
    model, batch = make_model(), with_answers(make_batch())
    places = target_places(batch.targets)
    with torch.no_grad():
        assert torch.equal(hidden_at(model, batch, places), last_hidden(model, batch).flatten(0, 1)[places])
