"""Isolation in every attention implementation: packed rows have the loss and the gradients of their sequences alone."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ConfigError
from kajiya.models.attention import attention_name, packed_sdpa, segment_mask
from kajiya.models.hidden import forward_inputs
from kajiya.models.isolation import architecture_isolates, can_isolate, isolation_inputs, sequence_bounds
from kajiya.models.outputs import masked_logits

LENGTHS = ((7, 12, 5), (16, 8))
"""Two rows of 24 tokens."""
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 50,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def packed(is_causal: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 50, (2, 24), generator=generator)
    segments = torch.tensor([np.repeat(np.arange(len(row)), row).tolist() for row in LENGTHS])
    positions = torch.tensor([np.concatenate([np.arange(n) for n in row]).tolist() for row in LENGTHS])
    targets = tokens.clone()
    if is_causal:
        targets = torch.full_like(tokens, NO_TARGET)
        inside = segments[:, 1:] == segments[:, :-1]
        targets[:, :-1][inside] = tokens[:, 1:][inside]
    return Batch(tokens, targets, positions, segments, int((targets != NO_TARGET).sum()), is_causal=is_causal)


def alone(batch: Batch) -> list[Batch]:
    """Every sequence as a batch of its own."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        for segment in range(len(lengths)):
            here = batch.segments[row] == segment
            parts = (part[row][here][None] for part in (batch.tokens, batch.targets, batch.positions, batch.segments))
            tokens, targets, positions, segments = parts
            n = int((targets != NO_TARGET).sum())
            found.append(Batch(tokens, targets, positions, segments * 0, n, is_causal=batch.is_causal))
    return found


def causal_model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    extra = {"sliding_window": 6} if name == "mistral" else {}
    config = AutoConfig.for_model(name, **SIZES, num_key_value_heads=1, head_dim=16, **extra)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention_name(attention, config)).eval()


def masked_model(attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SIZES)
    return AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    result: torch.Tensor = (
        model(**forward_inputs(model, batch)).logits if batch.is_causal else masked_logits(model, batch)
    )
    return result


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(logits_of(model, batch).flatten(0, 1), batch.targets.flatten(), reduction="sum")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


CASES = [
    *((name, attention, True) for name in ("llama", "mistral") for attention in ("sdpa", "eager")),
    ("bert", "sdpa", False),
    ("bert", "eager", False),
]


def model_of(name: str, attention: str) -> Any:
    return masked_model(attention) if name == "bert" else causal_model(name, attention)


@pytest.mark.parametrize(("name", "attention", "is_causal"), CASES)
def test_packed_has_the_loss_and_the_gradients_of_unpacked(name: str, attention: str, is_causal: bool) -> None:
    model, batch = model_of(name, attention), packed(is_causal)
    together = loss_of(model, batch)
    together.backward()
    of_packed = gradients(model)
    model.zero_grad()
    apart = torch.stack([loss_of(model, each) for each in alone(batch)]).sum()
    apart.backward()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    of_unpacked = gradients(model)
    assert of_packed.keys() == of_unpacked.keys()
    assert max(float(each.abs().max()) for each in of_packed.values()) > 1
    for each in of_packed:
        torch.testing.assert_close(of_packed[each], of_unpacked[each], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "attention", "is_causal"), CASES)
def test_a_changed_segment_leaves_the_others_untouched(name: str, attention: str, is_causal: bool) -> None:
    check_untouched(name, attention, is_causal)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_changed_segment_leaves_the_others_untouched_in_flex_attention(name: str) -> None:
    # Torch's compiler works in a process of its own, where its own deprecation warnings are none of ours.
    code = f"from tests.models.test_isolation import check_untouched; check_untouched({name!r}, 'flex_attention', True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_a_changed_segment_leaves_the_others_untouched_on_a_gpu(name: str, attention: str) -> None:
    check_untouched(name, attention, name != "bert", "cuda")


def check_untouched(name: str, attention: str, is_causal: bool, device: str = "cpu") -> None:
    """Change one segment at a time: its own logits change, no other's do, and all are those of each sequence alone."""
    model, batch = model_of(name, attention).to(device), packed(is_causal).to(device)
    with torch.no_grad():
        before = logits_of(model, batch)
        for row, segment in ((0, 0), (0, 1), (1, 1)):
            here = torch.zeros_like(batch.segments, dtype=torch.bool)
            here[row] = batch.segments[row] == segment
            kept = batch.tokens.clone()
            batch.tokens[here] = (batch.tokens[here] + 7) % 47 + 3
            changed = (logits_of(model, batch) - before).abs().amax(dim=-1)
            batch.tokens.copy_(kept)
            assert float(changed[~here].max()) == 0
            assert float(changed[here].min()) > 0
        for number, each in enumerate(alone(batch)):
            row, segment = (0, number) if number < len(LENGTHS[0]) else (1, number - len(LENGTHS[0]))
            expected = before[row][batch.segments[row] == segment]
            torch.testing.assert_close(logits_of(model, each)[0], expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_is_given_the_bounds_of_every_segment() -> None:
    batch = packed()
    model = causal_model("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    given = isolation_inputs(model, batch)
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 7, 19, 24, 40, 48]
    assert given["max_length_q"] == given["max_length_k"] == 16
    # The kernel's own rule, sequence by sequence between the bounds, gives what the mask gives.
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, 24, 16)
    flat = [each.transpose(1, 2).reshape(48, 2, 16) for each in (query, key, value)]
    bounds = given["cu_seq_lens_q"].tolist()
    pieces = [
        functional.scaled_dot_product_attention(*(each[start:stop].transpose(0, 1) for each in flat), is_causal=True)
        for start, stop in itertools.pairwise(bounds)
    ]
    by_bounds = torch.cat([piece.transpose(0, 1) for piece in pieces]).view(2, 24, 2, 16)
    by_mask, _ = packed_sdpa(model, query, key, value, segment_mask(batch.segments))
    torch.testing.assert_close(by_bounds, by_mask, rtol=1e-4, atol=1e-5)


def test_bounds_of_rows_with_the_same_segment_numbers_do_not_run_together() -> None:
    bounds = sequence_bounds(torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 2]]))
    assert bounds["cu_seq_lens_q"].tolist() == [0, 2, 3, 6, 7, 8, 9]


class Takes(torch.nn.Module):
    """A module that is told the segments."""

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return tokens + segments


def test_which_models_can_keep_segments_apart() -> None:
    assert can_isolate(causal_model("llama", "sdpa"))
    assert can_isolate(masked_model("eager"))
    assert can_isolate(Takes())
    assert not can_isolate(torch.nn.Linear(2, 2))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 50, "pad_token_id": 2}
    assert not can_isolate(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)))


def test_which_architectures_can_is_known_before_there_is_a_model(tmp_path: Path) -> None:
    assert architecture_isolates(ModelConfig(name="llama"))
    assert architecture_isolates(ModelConfig(name="bert"))
    assert not architecture_isolates(ModelConfig(name="mamba"))
    assert not architecture_isolates(ModelConfig(name="mine:model"))
    AutoConfig.for_model("mamba", hidden_size=16).save_pretrained(tmp_path)
    assert not architecture_isolates(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises(ConfigError, match=r"model.path: '.*' cannot be loaded: .*of-tomorrow"):
        architecture_isolates(ModelConfig(path=str(tmp_path)))
