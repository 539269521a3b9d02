"""Looking at a training without changing it: range test, profile, norms by layer; memory traded for time; utilization."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import ListLoader, make_batch
from tests.training.test_fit import make_setup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kajiya.config.schema import AdapterConfig
from kajiya.errors import ConfigError
from kajiya.models.adapt import transform
from kajiya.run.usage import peak_memory
from kajiya.training.find_lr import range_test
from kajiya.training.fit import Setup, fit, train_step
from kajiya.training.flops import experts_share, flops_per_token, matmul_peak
from kajiya.training.histograms import count_values, histograms_watch
from kajiya.training.layer_norms import norms_watch
from kajiya.training.memory import _largest_on_gpu, largest_micro_batch, rows_that_fit
from kajiya.training.precision import resolve_precision
from kajiya.training.profile import Profile
from kajiya.training.recompute import recompute_activations
from kajiya.training.state import TrainState

Make = Callable[..., torch.nn.Module]
CPU = torch.device("cpu")


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_the_range_test_leaves_no_trace_and_suggests_a_rate_that_learns(optim: str, tiny_model: Make) -> None:
    batches = [make_batch(2, seed=seed) for seed in range(3)]
    setup = make_setup(tiny_model(), batches, optim=optim)
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    generator = torch.get_rng_state()
    test = range_test(setup, 1e-6, 1e3, 60)
    assert setup.loader.state() == {"index": 0}
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())
    assert setup.optimizer.state_tensors().keys() == {f"master/{name}" for name in setup.optimizer.masters}
    assert len(test.rates) < 60, "the loss burst before the highest rate"
    assert list(test.rates) == sorted(test.rates)
    fit_at = make_setup(tiny_model(), batches, optim=optim, lr=lambda _step: test.suggestion, steps=40)
    losses = []
    state = TrainState()
    for _ in range(40):
        train_step(fit_at, state)
        losses.append(state.window["train/nll"][0] / state.window["train/nll"][1])
        state.window = {}
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5


def test_the_range_test_waits_for_the_loss_scale_of_fp16(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], precision="fp16-mixed")
    inner = setup.loss

    def large(model: Any, batch: Any) -> Any:
        terms, metrics = inner(model, batch)
        return {name: (total * 1e3, count) for name, (total, count) in terms.items()}, metrics

    state = TrainState()
    train_step(replace(setup, loss=large), state)
    assert state.overflows == 1
    setup.strategy.load_state({"factor": 65_536.0, "good": 0})
    test = range_test(replace(setup, loss=large), 1e-6, 1e-2, 40)
    assert len(test.rates) >= 10
    assert min(test.rates) > 1e-6, "the first steps overflowed"
    assert setup.strategy.state()["factor"] == 65_536, "undone"


def test_the_range_test_keeps_to_the_rows_that_the_run_begins_with(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], row_growth=(0.3, 0.6))
    inner, widths = setup.loss, set[int]()

    def seen(model: Any, batch: Any) -> Any:
        widths.add(batch.tokens.shape[1])
        return inner(model, batch)

    range_test(replace(setup, loss=seen), 1e-6, 1e-2, 20)
    assert widths == {4}


def test_a_profile_of_compiled_blocks_says_why_it_has_no_modules(tiny_model: Make, tmp_path: Path) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], steps=4)
    state = TrainState()
    profile = Profile(setup.model, CPU, tmp_path, compiled=True)
    for _ in range(4):
        train_step(setup, state)
        profile.after_step(state)
    table = (tmp_path / "table.txt").read_text()
    assert "Forward pass by module (not told apart where blocks are compiled)" in table
    assert "kajiya::" in table or "scaled_dot_product" in table, "attention is named"


def test_the_peak_is_of_products_as_a_layer_makes_them() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                strides.add(args[1].stride()[0])
            return func(*args, **(kwargs or {}))

    strides: set[int] = set()
    with Seen():
        torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
        of_a_layer, strides = strides, set()
        matmul_peak(CPU, resolve_precision("fp32", CPU))
    assert of_a_layer == strides == {1}, "in fp16 a CPU multiplies other layouts up to 20 times slower"


def test_a_profile_is_a_trace_and_a_table(tiny_model: Make, tmp_path: Path) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], steps=5)
    state = TrainState()
    profile = Profile(setup.model, CPU, tmp_path / "profile", compiled=False)
    written = []
    for _ in range(5):
        train_step(setup, state)
        written.append(profile.after_step(state))
    assert written == [None, None, None, tmp_path / "profile", None]
    names = {event["name"] for event in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]}
    assert {"module: model.layers.1.mlp", "aten::mm"} <= names
    assert "[memory]" in names, "the trace has the memory over time"
    table = (tmp_path / "profile/table.txt").read_text()
    assert "module: model.layers.0" in table
    memory = json.loads((tmp_path / "profile/memory.json").read_text())
    assert memory["ms"] == sorted(memory["ms"])
    assert len(memory["ms"]) > 50
    logits = 7 * 97 * 4  # a chunk of the head's logits is held on the way
    assert max(memory["bytes"]) - min(memory["bytes"]) > logits
    assert "Memory beyond what was held before: from" in table
    assert "aten::mm" in table
    assert {"data", "forward", "backward", "optimizer"} <= json.loads(
        (tmp_path / "profile/time.json").read_text()
    ).keys()
    assert not any(module._forward_hooks for module in setup.model.modules())


def test_norms_are_those_before_the_update(tiny_model: Make) -> None:
    heard: list[dict[str, Any]] = []
    watch = norms_watch(2, lambda kind, **fields: heard.append(fields))
    assert watch is not None
    setup = make_setup(tiny_model(), [make_batch(2)], steps=4, watches=(watch,), clip_norm=0.5)
    fit(setup, TrainState(), [], lambda: False)
    assert [each["step"] for each in heard] == [2, 4]
    gradients = [value for name, value in heard[0]["values"].items() if name.startswith("gradient_norm/")]
    assert math.sqrt(sum(value**2 for value in gradients)) == pytest.approx(0.5, rel=1e-3)
    assert norms_watch(None, lambda *_: None) is None


@pytest.mark.parametrize("how", ["full", "selective", "offload"])
def test_recomputed_activations_give_the_same_gradients(
    how: str, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, **_: object) -> None:
            super().__init__()  # pinned memory is for devices beside the host

        def __enter__(self) -> None:
            moved.append(self)
            super().__enter__()

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Counted)
    gradients = []
    for each in ("off", how):
        model = tiny_model()
        # The model stays where it is; the host's memory is then another copy in the same memory.
        recompute_activations(model, each, torch.device("cuda") if each == "offload" else CPU)
        setup = make_setup(model, [make_batch(2)], clip_norm=None)
        kept: list[torch.Tensor] = []
        setup.optimizer.step = lambda lr, setup=setup, kept=kept: kept.extend(  # type: ignore[method-assign]
            grad.clone() for grad in setup.optimizer.grads()
        )
        train_step(setup, TrainState())
        gradients.append(kept)
    assert len(moved) == (2 if how == "offload" else 0), "once for each block"
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_module_without_checkpointing_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        recompute_activations(torch.nn.Linear(2, 2), "full", CPU)
    with pytest.raises(ConfigError, match="GPU"):
        recompute_activations(torch.nn.Linear(2, 2), "offload", CPU)


def test_the_rows_that_fit() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    assert rows_that_fit(sizes, 100.0, 2000, 4) == 16  # 12 more rows of 100 bytes in 1,600 of the 2,000 free
    assert rows_that_fit(sizes, 100.0, 0, 4) == 4
    assert rows_that_fit(sizes, 100.0, None, 4) == 4


def test_a_gpu_is_searched_from_the_largest_micro_batch_down_on_the_hardest_rows(tiny_model: Make) -> None:
    """As though the GPU had room for three rows of 16 tokens, and the loader gave short rows first."""
    asked: list[int] = []
    loader = ListLoader([make_batch(8, tokens=4), make_batch(8, tokens=16)])
    setup = make_setup(tiny_model(), [], loader=loader, steps=1)
    size = 8

    def resize(n: int) -> None:
        nonlocal size
        size = n

    def loss(model: Any, batch: Any) -> Any:
        asked.append(size)
        assert batch.tokens.shape[1] == 16
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return setup.loss(model, batch)

    def of_gpu(trial: Setup, resize: Callable[[int], None], sizes: list[int]) -> int:
        return _largest_on_gpu(replace(trial, loss=loss), resize, sizes)

    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kajiya.training.memory._largest_on_cpu", of_gpu)
        assert largest_micro_batch(setup, resize, 8) == 2
    assert asked == [8, 4, 2]
    assert loader.state() == {"index": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())


def test_a_cpu_is_asked_with_few_rows(tiny_model: Make) -> None:
    """Eight tiny rows fit into any memory; what was tried is undone."""
    asked: list[int] = []
    setup = make_setup(tiny_model(), [make_batch(2)])
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    assert largest_micro_batch(setup, asked.append, 8) == 8
    assert asked == [4, 1, 4], "behind a first step, a row and a few tell what one takes"
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak of memory")
def test_what_took_memory_before_hides_nothing_of_what_a_row_takes(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 24 MiB each, behind a peak of 400 MiB, where 480 MiB are free: 384 of them are given out."""
    torch.ones(100, 2**20)  # taken, written, and given back
    rows = 0

    def resize(n: int) -> None:
        nonlocal rows
        rows = n

    setup = make_setup(tiny_model(), [make_batch(2)])

    def loss(model: Any, batch: Any) -> Any:
        torch.ones(6 * rows, 2**20)
        return setup.loss(model, batch)

    monkeypatch.setattr("kajiya.training.memory.free_bytes", lambda: 480 * 2**20)
    before = peak_memory()
    assert largest_micro_batch(replace(setup, loss=loss), resize, 64) == 16
    assert peak_memory() >= before, "the highest of all is still known"


def test_operations_by_palms_formula(tiny_model: Make) -> None:
    model = tiny_model(tied=True)
    n = sum(parameter.numel() for parameter in model.parameters())
    assert flops_per_token(model, 64) == 6 * n + 12 * 2 * 32 * 64
    untied = tiny_model(tied=False)
    assert flops_per_token(untied, 64) == flops_per_token(model, 64)
    assert flops_per_token(torch.nn.Linear(4, 3, bias=False), 64) == 6 * 12
    assert matmul_peak(CPU, resolve_precision("fp32", CPU)) > 1e8


def test_of_a_mixture_the_experts_that_a_token_goes_through_are_counted() -> None:
    """As torch counts a step of it, whose experts are products of their own tokens alone."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, tie_word_embeddings=False))
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    assert experts_share(model) == 0.25
    ids = torch.randint(0, 64, (2, 16))
    with FlopCounterMode(display=False) as counter:
        hidden = model(inputs_embeds=torch.randn(2, 16, 32, requires_grad=True), labels=ids)
        hidden.loss.backward()
    norms = sum(6 * each.numel() for name, each in model.named_parameters() if "norm" in name)
    assert flops_per_token(model, 16) - norms == counter.get_total_flops() / ids.numel()


def test_fp8_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision.*GPU"):
        resolve_precision("fp8", CPU)


def test_operations_of_an_adapter_are_those_that_torch_counts(tiny_model: Make) -> None:
    model = tiny_model(tied=False)
    whole = flops_per_token(model, 64)
    lora = AdapterConfig("lora", {"r": 4})
    transform(model, lora, "none", seed=0)
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()  # the first block's inputs, too, as the formula has it
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    norms = sum(4 * each.numel() for name, each in model.named_parameters() if "norm" in name)
    assert flops_per_token(model, 64) - norms == counter.get_total_flops() / ids.numel()
    assert flops_per_token(model, 64) < whole
    quantized = tiny_model(tied=False)
    transform(quantized, lora, "nf4", seed=0)
    assert flops_per_token(quantized, 64) == flops_per_token(model, 64)


def test_histograms_count_every_value_where_it_lies(tiny_model: Make) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    watch = histograms_watch(2, lambda kind, **fields: heard.append((kind, fields)))
    assert watch is not None
    setup = make_setup(tiny_model(), [make_batch(2)], steps=3, watches=(watch,), clip_norm=0.5)
    grads: dict[str, torch.Tensor] = {}
    step = setup.optimizer.step

    def keep(lr: float) -> None:
        grads.update({name: p.grad.clone() for name, p in setup.optimizer.parameters.items() if p.grad is not None})
        grads.update({f"weight of {name}": p.detach().clone() for name, p in setup.optimizer.parameters.items()})
        step(lr)

    setup.optimizer.step = keep  # type: ignore[method-assign]
    train_step(setup, state := TrainState())
    train_step(setup, state)
    ((kind, fields),) = heard
    assert (kind, fields["step"]) == ("histograms", 2)
    names = list(setup.optimizer.parameters)
    assert fields["values"].keys() == {f"{what}/{name}" for what in ("gradient", "weight") for name in names}
    for name in names:
        for what, tensor in (("gradient", grads[name]), ("weight", grads[f"weight of {name}"])):
            told = fields["values"][f"{what}/{name}"]
            counts, edges = np.histogram(tensor.numpy(), bins=32, range=(told["low"], told["high"]))
            assert sum(told["counts"]) == tensor.numel()
            assert edges[0] <= tensor.min()
            assert abs(counts - np.array(told["counts"])).sum() <= 0.02 * tensor.numel() + 2, (
                "but for values on an edge"
            )
    ((low, high, counts),) = count_values([torch.full((5,), 3.0)])
    assert (low, high, sum(counts)) == (2.5, 3.5, 5)
    assert histograms_watch(None, lambda *_: None) is None
