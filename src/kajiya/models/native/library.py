"""The compiled operators: structures field by field, signatures, and the calls on tensors."""

import ctypes
import functools
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch

from kajiya.errors import KajiyaError
from kajiya.run.native.build import build_library

LANES = 16
"""Widths are multiples of this (kLanes)."""
WIDEST_HEAD = 256
_SOURCES = ("tiles.h", "attention.h", "pointwise.h", "updates.h", "operators.cpp")
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


class Heads(Structure):
    """A tensor [B, n, T, H] by its strides, in elements."""

    _fields_ = (("data", c_void_p), ("row", c_int64), ("head", c_int64), ("token", c_int64))


class Attention(Structure):
    """Arguments of both passes of attention."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "N", "K", "T", "H")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("first", "cos", "sin")),
        *((name, Heads) for name in ("q", "k", "v", "out")),
        ("log_sums", c_void_p),
        *((name, Heads) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("n_threads", c_int64),
    )


class HeadNorms(Structure):
    """Arguments of the norms of queries and keys."""

    _fields_ = (
        *((name, c_int64) for name in ("N", "Q", "K", "D")),
        ("eps", c_float),
        ("shift", c_float),
        ("n_threads", c_int64),
    )


class Entropy(Structure):
    """Arguments of the loss's softmax."""

    _fields_ = (
        ("N", c_int64),
        ("V", c_int64),
        ("targets", c_void_p),
        ("weights", c_void_p),
        ("z_loss", c_float),
        ("smoothing", c_float),
        ("sums", POINTER(c_double)),
        ("n_threads", c_int64),
    )


class Sums(Structure):
    """Arguments of the running sums of a softmax."""

    _fields_ = (
        ("V", c_int64),
        ("N", c_int64),
        ("largest", c_void_p),
        ("total", c_void_p),
        ("n_threads", c_int64),
    )


class AdamW(Structure):
    """Arguments of an AdamW update of many tensors; pointers to arrays of one entry a tensor."""

    _fields_ = (
        ("n_tensors", c_int64),
        *((name, c_void_p) for name in ("sizes", "steps", "grads", "masters", "means", "squares", "weights")),
        *((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "decay")),
        ("n_threads", c_int64),
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled operators, from the cache folder or built now (a few seconds). Raises `NativeBuildError`."""
    library = build_library("operators", "kajiya.models.native", _SOURCES, "operators.cpp")
    pointers = c_void_p
    signatures = {
        "attention_forward": [c_int32, POINTER(Attention)],
        "attention_backward": [c_int32, POINTER(Attention)],
        "norm_forward": [c_int32, c_int64, c_int64, c_float, c_float, *[pointers] * 4, c_int64],
        "norm_backward": [c_int32, c_int64, c_int64, c_float, *[pointers] * 6, c_int64],
        "head_norms_forward": [c_int32, POINTER(HeadNorms), *[pointers] * 4],
        "head_norms_backward": [c_int32, POINTER(HeadNorms), *[pointers] * 6],
        "gated_forward": [c_int32, c_int32, c_int64, c_int64, *[pointers] * 2, c_int64],
        "gated_backward": [c_int32, c_int32, c_int64, c_int64, *[pointers] * 4, c_int64],
        "entropy": [c_int32, POINTER(Entropy), c_void_p, c_int32],
        "softmax_sums": [c_int32, POINTER(Sums), c_void_p],
        "squares": [c_int32, c_int64, *[pointers] * 3, c_int64],
        "adamw": [c_int32, POINTER(AdamW)],
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"kajiya_{name}")
        function.argtypes, function.restype = arguments, None
    return library


@functools.cache
def native_problem() -> str | None:
    """Why the operators cannot be had on this machine, in words; `None` when they can."""
    try:
        load_library()
    except (KajiyaError, OSError) as error:
        return str(error)
    return None


operator = functools.partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
"""Registers a function of CPU tensors with torch, by name."""


def is_plain_call() -> bool:
    """Whether nothing but the call's result is asked for: no compiler traces it, no dispatch mode or profiler watches it.

    torch's dispatcher costs an operator that is written in Python about 0.2 ms where a large product has just emptied the
    caches, as much as a norm's own work; so what nobody watches goes past it.
    """
    if torch.compiler.is_compiling():  # first, for it cannot trace the others
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and not torch._C._autograd._profiler_enabled()


def kind_of(tensor: torch.Tensor) -> int:
    """The operators' number of the tensor's dtype."""
    return _KINDS[tensor.dtype]


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the operators take these: on the CPU, of one dtype, float32 or bf16."""
    first = tensors[0].dtype
    return first in _KINDS and all(each.device.type == "cpu" and each.dtype == first for each in tensors)


def heads(tensor_BNTH: torch.Tensor | None) -> Heads:
    """A [B, n, T, H] tensor whose last axis has no gaps, for the library."""
    if tensor_BNTH is None:
        return Heads()
    row, head, token, _ = tensor_BNTH.stride()
    return Heads(tensor_BNTH.data_ptr(), row, head, token)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's data, or null."""
    return None if tensor is None else tensor.data_ptr()
