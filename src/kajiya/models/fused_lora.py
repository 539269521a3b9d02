"""Products with low-rank adapters on frozen matrices, several at once: three products where PEFT's layers take five passes each.

Shape letters: M tokens, D width of the input, O outputs of all matrices, R ranks of all adapters.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from kajiya.models.native.library import is_plain_call


@dataclass(frozen=True)
class Adapted:
    """One linear's parts but for its bias: its matrix, and the two of its adapter with their factor, where it has one."""

    weight: torch.Tensor
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scaling: float = 0.0


def parts_of(linear: Any) -> Adapted | None:
    """The parts of a frozen matrix, bare or with one plain LoRA adapter of PEFT in force; `None` for whatever else."""
    if type(linear) is nn.Linear:
        return None if linear.weight.requires_grad else Adapted(linear.weight)
    if type(linear).__name__ != "Linear" or not type(linear).__module__.startswith("peft.tuners.lora"):
        return None
    base, active = linear.base_layer, linear.active_adapters
    is_plain = type(base) is nn.Linear and not base.weight.requires_grad
    if not is_plain or linear.merged or linear.disable_adapters or len(active) != 1 or active[0] not in linear.lora_A:
        return None
    name = active[0]
    dropout, down, up = linear.lora_dropout[name], linear.lora_A[name], linear.lora_B[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    if drops or name in linear.lora_variant or up.bias is not None or down.weight.dtype != base.weight.dtype:
        return None
    return Adapted(base.weight, down.weight, up.weight, linear.scaling[name])


def adapted_product(x_MD: torch.Tensor, whole_OD: torch.Tensor, parts: list[Adapted]) -> torch.Tensor:
    """x · (W + scaling · up · down)ᵀ of all parts, side by side [M, O]; `whole_OD` is their matrices, one below the other."""
    having = [part for part in parts if part.down is not None and part.up is not None]
    if not having:
        return x_MD @ whole_OD.T
    places, row = [], 0
    for part in parts:
        if part.down is not None:
            places.append((row, part.scaling))
        row += len(part.weight)
    downs, ups = [part.down for part in having], [part.up for part in having]
    result: torch.Tensor = _AdaptedProduct.apply(x_MD, whole_OD, places, *downs, *ups)
    return result


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, whole: Any, places: list[tuple[int, float]], *factors: torch.Tensor) -> torch.Tensor:
        n = len(places)
        down_RD = torch.cat(factors[:n])
        ups = [up * scaling for (_, scaling), up in zip(places, factors[n:], strict=True)]
        low_MR = x @ down_RD.T
        ctx.save_for_backward(x, whole, down_RD, low_MR, *ups)
        ctx.places = places
        product_MO: torch.Tensor = x @ whole.T
        if not is_plain_call():  # selective checkpointing keeps the product as it is
            product_MO = product_MO.clone()
        for rows, columns, up in zip(*_parts(places, ups), ups, strict=True):
            product_MO[:, rows].addmm_(low_MR[:, columns], up.T)
        return product_MO

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, whole, down_RD, low_MR, *ups = ctx.saved_tensors
        grad = grad.contiguous()
        # Part by part, for between the parts of one and the columns of another there is nothing.
        all_rows, all_columns = _parts(ctx.places, ups)
        grad_low = torch.cat([grad[:, rows] @ up for rows, up in zip(all_rows, ups, strict=True)], dim=1)
        grad_ups = [
            (grad[:, rows].T @ low_MR[:, columns]).mul_(scaling)
            for rows, columns, (_, scaling) in zip(all_rows, all_columns, ctx.places, strict=True)
        ]
        grad_x = (grad @ whole).addmm_(grad_low, down_RD) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *(grad_low.T @ x).split([up.shape[1] for up in ups]), *grad_ups


def _parts(places: list[tuple[int, float]], ups: list[torch.Tensor]) -> tuple[list[slice], list[slice]]:
    """Of each adapter, its outputs among all of O and its ranks among all of R."""
    rows = [slice(row, row + len(up)) for (row, _), up in zip(places, ups, strict=True)]
    ends = list(accumulate(up.shape[1] for up in ups))
    return rows, [slice(end - up.shape[1], end) for end, up in zip(ends, ups, strict=True)]
