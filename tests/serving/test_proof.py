"""The proof before the first answer: what computes wrongly is refused, however coarse its weights are."""

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kajiya.errors import KajiyaError
from kajiya.serving import proof
from kajiya.serving.loading import EngineOptions, engine_of
from kajiya.serving.native import layout
from kajiya.serving.native.architecture import Rotary
from kajiya.serving.native.model import NativeModel

Patch = pytest.MonkeyPatch


def _rotates_twice_as_far(patch: Patch) -> None:
    real = Rotary.__call__
    patch.setattr(Rotary, "__call__", lambda self, x, positions: real(self, x, 2 * positions))


def _steps(patch: Patch, change: Callable[[layout.Step, int], None]) -> None:
    real, calls = NativeModel.step, [0]

    def step(self: Any, step: layout.Step) -> None:
        calls[0] += 1
        change(step, calls[0])
        real(self, step)

    patch.setattr(NativeModel, "step", step)


def _sees_its_own_chunk_only(patch: Patch) -> None:
    def change(step: layout.Step, _: int) -> None:
        positions = (ctypes.c_int32 * step.n_tokens).from_address(step.positions)
        positions[:] = range(step.n_tokens)

    _steps(patch, change)


def _reads_the_blocks_in_the_wrong_order(patch: Patch) -> None:
    def change(step: layout.Step, call: int) -> None:
        if call == 4:  # 10 tokens behind 12 that are in the first block
            table = (ctypes.c_int32 * 2).from_address(step.tables)
            table[:] = table[::-1]

    _steps(patch, change)


def _takes_groups_for_their_neighbours(patch: Patch) -> None:
    real = NativeModel._linear

    def linear(self: Any, key: str, matrices: list[torch.Tensor], biases: Any) -> Any:
        return real(self, key, [matrix.roll(layout.GROUP, 1) for matrix in matrices], biases)

    patch.setattr(NativeModel, "_linear", linear)


@pytest.mark.parametrize(
    "fault",
    [
        _rotates_twice_as_far,
        _sees_its_own_chunk_only,
        _reads_the_blocks_in_the_wrong_order,
        _takes_groups_for_their_neighbours,
    ],
)
@pytest.mark.parametrize("settings", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"cache_precision": "int8"}])
def test_a_decoder_that_computes_wrongly_is_refused(
    reference: Any, monkeypatch: Patch, fault: Callable[[Patch], None], settings: dict[str, str]
) -> None:
    options = EngineOptions(precision="fp32", device="cpu", max_batch=2, **settings)
    engine_of(reference, frozenset(), options, "native")
    fault(monkeypatch)
    with pytest.raises(KajiyaError, match="logits differ"):
        engine_of(reference, frozenset(), options, "native")


@pytest.mark.parametrize(("weights", "coarse"), [("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_costs_is_no_part_of_the_proof(
    reference: Any, weights: str, coarse: float, dtype: torch.dtype
) -> None:
    """Measured against the plain model these weights are off by more than what the proof lets pass against the rounded one."""
    model = copy.deepcopy(reference).to(dtype)
    engine = engine_of(model, frozenset(), EngineOptions(device="cpu", max_batch=2, quantize=weights), "native")
    plain_TV, rounded_TV = proof.plain_logits(model), proof.plain_logits(model, weights)
    logits_TV = proof.read_logits(engine.runner, proof.probe_ids(512), (7, 16))
    spread = plain_TV.std()
    assert (logits_TV - plain_TV).square().mean().sqrt() / spread > coarse
    assert (logits_TV - rounded_TV).square().mean().sqrt() / spread < proof.TOLERANCE[weights] / 2
    # The model itself is left as it was.
    assert not any(module._forward_hooks for module in model.modules())
