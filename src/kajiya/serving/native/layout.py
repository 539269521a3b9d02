"""The structures of `decoder.cpp`, field by field, and the signatures of its functions."""

import ctypes
from ctypes import POINTER, Structure, c_bool, c_float, c_int32, c_int64, c_void_p

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""How weights are stored, by the decoder's number."""
CACHE_KINDS = {"fp32": 0, "bf16": 1, "int8": 2}
"""How keys and values are stored, by the decoder's number."""
GATES = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
"""A gate's function as configs name it, by the decoder's number."""
NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm", "attention_result_norm", "mlp_result_norm")
"""The weights of a layer's norms, of which all but the first two may be missing."""
TARGETS = ("qkv", "out", "gate_up", "down")
"""The four products of a layer, in the decoder's order."""
BLOCK_TOKENS = 16
"""Positions of a block of the cache (kBlock)."""
PANEL = 32
"""Outputs of a panel of packed weights (kPanel)."""
GROUP = 32
"""Inputs that share a scale (kGroup)."""
LANES = 16
"""Numbers that the decoder takes at a time (kLanes)."""
RANKS = 4
"""Ranks of an adapter's part that lie together (kRanks)."""


class Linear(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "n_out", "n_in", "padding")),
        *((name, c_void_p) for name in ("weights", "scales", "bias")),
    )


class LayerCache(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


class Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in NORMS),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int32) for name in ("rotary", "window")),
        *((name, Linear) for name in TARGETS),
        ("cache", LayerCache),
    )


_MODEL_INTEGERS = (
    "n_layers",
    "width",
    "n_query",
    "n_key",
    "head_width",
    "gate",
    "mlp_width",
    "vocab",
    "cache_kind",
    "weight_kind",
    "embedding_kind",
    "max_positions",
)


class Model(Structure):
    _fields_ = (
        *((name, c_int32) for name in _MODEL_INTEGERS),
        *((name, c_float) for name in ("epsilon", "attention_scale", "embedding_scale", "score_cap", "logit_cap")),
        *((name, c_void_p) for name in ("embedding", "final_norm")),
        ("head", Linear),
        ("layers", POINTER(Layer)),
    )


class Patch(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layer", "target", "rank", "n_in", "offset", "n_out")),
        ("rows", c_void_p),
    )


class Adapter(Structure):
    _fields_ = (("n_patches", c_int32), ("is_bf16", c_int32), ("patches", POINTER(Patch)))


class Step(Structure):
    _fields_ = (
        *(
            (name, c_int32)
            for name in ("n_tokens", "n_sequences", "table_stride", "n_outputs", "n_threads", "n_hidden")
        ),
        *(
            (name, c_void_p)
            for name in (
                "tokens",
                "positions",
                "starts",
                "tables",
                "adapters",
                "outputs",
                "hidden_rows",
                "logits",
                "hidden",
                "best",
                "best_logprobs",
                "log_sums",
            )
        ),
    )


def declare(library: ctypes.CDLL) -> None:
    """Give the functions of the library their types."""
    library.kajiya_packed_bytes.argtypes = [c_int32, c_int64, c_int64]
    library.kajiya_packed_bytes.restype = c_int64
    library.kajiya_pack.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_int32]
    library.kajiya_pack.restype = None
    library.kajiya_product.argtypes = [POINTER(Linear), c_void_p, c_int64, c_void_p, c_int32]
    library.kajiya_product.restype = None
    library.kajiya_step.argtypes = [POINTER(Model), POINTER(Step)]
    library.kajiya_step.restype = c_bool
    library.kajiya_copy_block.argtypes = [POINTER(Model), c_int32, c_int32]
    library.kajiya_copy_block.restype = None
