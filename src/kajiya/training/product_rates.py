"""How fast this CPU multiplies matrices in bf16 and in fp32, by a short measurement."""

import functools
import time
from dataclasses import dataclass

import torch

_TOKENS, _WIDTH, _WIDER = 512, 512, 1024
"""A layer's product of middle size; the two gradients are products of the same numbers in other layouts."""
_ROUNDS = 4
_WORTH = 1.2
"""bf16 must be this much faster: the rest of a step (attention, norms, the optimizer's rounding) gains nothing from it."""


@dataclass(frozen=True)
class ProductRates:
    """Operations a second of a layer's three products together, in each dtype."""

    fp32: float
    bf16: float

    @property
    def prefers_bf16(self) -> bool:
        """Whether bf16 is faster by enough to take it."""
        return self.bf16 >= _WORTH * self.fp32


@functools.cache
def measure_product_rates() -> ProductRates:
    """Multiply for some tens of milliseconds, fp32 and bf16 in turns; the best of each counts, so that other work does not."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # Constants: the random generators of the run are left alone.
    operands = {
        dtype: tuple(
            torch.full(shape, 0.01, dtype=dtype) for shape in ((_TOKENS, _WIDTH), (_WIDER, _WIDTH), (_TOKENS, _WIDER))
        )
        for dtype in best
    }
    with torch.no_grad():
        for _ in range(_ROUNDS):
            for dtype, (x, weight, grad) in operands.items():
                began = time.perf_counter()
                torch.mm(x, weight.T)
                torch.mm(grad, weight)
                torch.mm(grad.T, x)
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    flops = 3 * 2 * _TOKENS * _WIDTH * _WIDER
    return ProductRates(fp32=flops / best[torch.float32], bf16=flops / best[torch.bfloat16])
