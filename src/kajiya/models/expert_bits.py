"""A mixture's experts in NF4: one tensor [expert, out, in] whose values are made anew for each use, by autograd too.

It is a tensor of its own kind and no layer, since the experts of Transformers are none: their code, and PEFT's layers around
them, read it as the weights that it stands for. Autograd keeps it as it is, and the backward pass makes the values again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from kajiya.models.extras import require_bitsandbytes

_BLOCK = 64
"""Values that share a scale."""
_PARTS = ("packed", "scales", "offset", "outer_scales", "code", "outer_code")
"""Two values a byte; the blocks' scales in 8 bits about their mean, with the scales of these; what each bit pattern stands for."""


class NF4Experts(torch.Tensor):
    """Experts [expert, out, in] in 4 bits, blocks and double quantization as `model.quantize=nf4` of a linear layer."""

    parts: tuple[torch.Tensor, ...]
    stored: tuple[int, ...]
    """Shape that they were quantized in; their own has the last two sizes the other way round where `is_flipped`."""
    is_flipped: bool

    @staticmethod
    def __new__(
        cls, parts: Sequence[torch.Tensor], stored: Sequence[int], dtype: torch.dtype, is_flipped: bool = False
    ) -> "NF4Experts":
        n, rows, columns = stored
        shape, strides = ((n, columns, rows), (1, columns)) if is_flipped else ((n, rows, columns), (columns, 1))
        made: NF4Experts = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, (rows * columns, *strides), dtype=dtype, device=parts[0].device
        )
        made.parts, made.stored, made.is_flipped = tuple(parts), tuple(stored), is_flipped
        return made

    def dequantize(self) -> torch.Tensor:
        """The values, in the dtype that the tensor has."""
        return self._as_read(_unpacked(self.parts, self.stored))

    def expert(self, number: int) -> torch.Tensor:
        """The values of one expert."""
        n, *sizes = self.stored
        if not -n <= number < n:
            raise IndexError(f"expert {number} of {n}")
        number, n_values = number % n, sizes[0] * sizes[1]
        if n_values % _BLOCK:
            return self.dequantize()[number]
        return self._as_read(_unpacked(self.parts, sizes, slice(number * n_values, (number + 1) * n_values)))

    def _as_read(self, values: torch.Tensor) -> torch.Tensor:
        return (values.transpose(-1, -2) if self.is_flipped else values).to(self.dtype)

    def like(self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> "NF4Experts":
        """The same experts with each tensor that they consist of changed."""
        return NF4Experts([change(each) for each in self.parts], self.stored, dtype or self.dtype, self.is_flipped)

    def flipped(self) -> "NF4Experts":
        """With the last two dimensions the other way round."""
        return NF4Experts(self.parts, self.stored, self.dtype, not self.is_flipped)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"NF4Experts({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        for name, part in zip(_PARTS, self.parts, strict=True):
            setattr(self, name, part)
        return list(_PARTS), (self.stored, self.dtype, self.is_flipped)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], facts: Any, *_: Any) -> "NF4Experts":
        stored, dtype, is_flipped = facts
        return NF4Experts([inner[name] for name in _PARTS], stored, dtype, is_flipped)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _KEPT and isinstance(args[0], NF4Experts):
            kept = _KEPT[function](*args, **kwargs)
            if kept is not None:
                return kept
        assert not isinstance(args[0], NF4Experts) or not function._schema.is_mutable, (
            f"{function} changes experts in 4 bits"
        )
        args, kwargs = tree_map(
            lambda each: each.dequantize() if isinstance(each, NF4Experts) else each, (args, kwargs)
        )
        return function(*args, **kwargs)


def quantize_experts(values: torch.Tensor) -> torch.nn.Parameter:
    """A frozen parameter of the values [expert, out, in] in NF4."""
    functional = require_bitsandbytes("model.quantize").functional
    packed, state = functional.quantize_4bit(
        values.detach().contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    parts = (packed, state.absmax, state.offset, state.state2.absmax, state.code, state.state2.code)
    return torch.nn.Parameter(NF4Experts(parts, tuple(values.shape), values.dtype), requires_grad=False)


def _unpacked(parts: Sequence[torch.Tensor], shape: Sequence[int], place: slice | None = None) -> torch.Tensor:
    """Values in float32 of the shape; those at the `place` among all, which begins and ends with a block."""
    functional = require_bitsandbytes("model.quantize").functional
    packed, scales, offset, outer_scales, code, outer_code = parts
    outer = functional.QuantState(outer_scales, code=outer_code, blocksize=256, dtype=torch.float32)
    known = functional.dequantize_blockwise(scales, outer) + offset
    if place is not None:
        packed = packed[place.start // 2 : place.stop // 2]
        known = known[place.start // _BLOCK : place.stop // _BLOCK]
    state = functional.QuantState(
        known.contiguous(), torch.Size(shape), code, _BLOCK, quant_type="nf4", dtype=torch.float32
    )
    return functional.dequantize_4bit(packed, state)  # type: ignore[no-any-return]


def _same(tensor: NF4Experts, *_: Any, **__: Any) -> NF4Experts:
    return tensor.like(lambda each: each)


def _converted(tensor: NF4Experts, *, dtype: Any = None, device: Any = None, **_: Any) -> NF4Experts:
    return tensor.like(lambda each: each.to(device or each.device), dtype)


def _transposed(tensor: NF4Experts, first: int, second: int) -> NF4Experts | None:
    return tensor.flipped() if {first % 3, second % 3} == {1, 2} else None


def _selected(tensor: NF4Experts, dim: int, index: int) -> torch.Tensor | None:
    return tensor.expert(index) if dim == 0 else None


_ATEN = torch.ops.aten
_KEPT: Mapping[Any, Callable[..., torch.Tensor | None]] = {
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
    _ATEN.clone.default: lambda tensor, **_: tensor.like(torch.clone),
    _ATEN._to_copy.default: _converted,
    _ATEN.transpose.int: _transposed,
    _ATEN.select.int: _selected,
}
"""What needs not all values; `None`: it does after all."""
