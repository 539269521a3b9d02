"""Packed rows by bounds in place of a mask. The kernel is a GPU's: here a plain loop over the segments stands in its place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.conftest import make_batch, make_model
from torch.nn import functional

from kajiya.data.batch import Batch
from kajiya.models import unequal
from kajiya.models.attention import PACKED_SDPA, packed_sdpa, segment_mask
from kajiya.models.isolation import isolation_inputs, packed_words
from kajiya.models.unequal import bounds_problem, by_bounds, distance_from_masked, filled_up, takes_bounds

CPU = torch.device("cpu")


def _kernel(calls: list[int]) -> Callable[..., torch.Tensor]:
    """What torch says of `torch.nn.attention.varlen.varlen_attn`: heads [tokens, N, H], a window of (W, 0)."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        calls.append(len(cu_seq_q))
        assert cu_seq_q.dtype == torch.int32
        assert max(cu_seq_q.diff()) <= max_q
        assert window_size[1] == 0
        parts = []
        for begin, end in zip(cu_seq_q.tolist(), cu_seq_k.tolist()[1:], strict=False):
            ago = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None]
            seen = (ago >= 0) & ((ago <= window_size[0]) | torch.tensor(window_size[0] < 0))
            q, k, v = (each[begin:end].transpose(0, 1)[None] for each in (query, key, value))
            done = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
            parts.append(done[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU that has the kernel; how many bounds each call had."""
    made: list[int] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _kernel(made))
    monkeypatch.setattr("kajiya.models.isolation.bounds_problem", lambda *_: None)
    monkeypatch.setattr("kajiya.models.isolation.native_problem", lambda: "off")
    return made


@pytest.mark.parametrize("window", [None, 3])
def test_bounds_and_a_mask_give_the_same(window: int | None, calls: list[int]) -> None:
    batch = make_batch(3).laid_out()
    assert batch.layout is not None
    query, key, value = (torch.randn(3, n, 16, 8) for n in (4, 2, 2))
    given: dict[str, Any] = {"sliding_window": window, "scaling": 0.3}
    module = torch.nn.Module()
    by_mask, _ = packed_sdpa(module, query, key, value, segment_mask(batch.segments), **given)
    first = torch.zeros(3, 1, 1, 16, dtype=torch.int32)
    found, _ = packed_sdpa(module, query, key, value, first, cu_seq_lens_q=filled_up(batch.layout.bounds), **given)
    torch.testing.assert_close(found, by_mask)
    assert calls == [8], "seven bounds, filled up to a power of two"


def test_a_model_reads_packed_rows_by_bounds(calls: list[int]) -> None:
    """Loss and gradients are those under a mask; heads that the kernel does not take, and dropout, get the mask."""
    model: Any = make_model(hidden_size=32, n_heads=2)
    assert model.config._attn_implementation == PACKED_SDPA
    batch = make_batch(2)
    outcomes = []
    for each in (batch, batch.laid_out()):
        model.zero_grad()
        inputs = isolation_inputs(model, each)
        logits = model(input_ids=each.tokens, position_ids=each.positions, use_cache=False, **inputs).logits
        logits.square().mean().backward()
        outcomes.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 2, "once a block, of the batch with a layout"
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_of_one_segment_need_neither(calls: list[int]) -> None:
    batch = make_batch(2)
    whole = Batch(batch.tokens, batch.targets, batch.positions, torch.zeros_like(batch.segments), batch.n_targets)
    assert isolation_inputs(make_model(), whole.laid_out()) == {"attention_mask": None}


def test_what_is_not_taken_gets_a_mask(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(2).laid_out()
    assert batch.layout is not None
    odd = [torch.randn(2, 2, 16, 12) for _ in range(3)]
    assert not takes_bounds(*odd)
    inputs = isolation_inputs(make_model(), batch)
    found, _ = packed_sdpa(torch.nn.Module(), *odd, **inputs)
    by_mask, _ = packed_sdpa(torch.nn.Module(), *odd, segment_mask(batch.segments))
    torch.testing.assert_close(found, by_mask)
    assert not calls
    monkeypatch.setattr("kajiya.models.isolation.bounds_problem", lambda *_: "it is broken")
    masked = isolation_inputs(make_model(), batch)
    assert masked.keys() == {"attention_mask"}
    assert masked["attention_mask"].shape == (2, 1, 16, 16)


def test_the_kernel_is_compared_before_it_is_taken(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert distance_from_masked(CPU, torch.float32) < 1e-5
    assert calls
    right = by_bounds

    def leaking(query: Any, key: Any, value: Any, bounds: Any) -> torch.Tensor:
        return right(query, key, value, bounds[torch.tensor([0, 2, 3, 3])])

    monkeypatch.setattr(unequal, "by_bounds", leaking)
    assert distance_from_masked(CPU, torch.float32) > 0.1
    assert bounds_problem(CPU, torch.bfloat16) == "the kernel is one for bf16 and fp16 on a GPU"


def test_the_plan_says_how_packed_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = make_model(), torch.device("cuda")
    assert packed_words(model, CPU, torch.bfloat16) == ""
    for problem, words in (
        (None, "; packed rows by bounds"),
        ("it is late", "; packed rows under a mask: by bounds, it is late"),
    ):
        monkeypatch.setattr("kajiya.models.isolation.bounds_problem", lambda *_, problem=problem: problem)
        assert packed_words(model, gpu, torch.bfloat16) == words
    assert packed_words(make_model(attention="eager"), gpu, torch.bfloat16) == ""
