"""What computes a model: the C++ decoder where it can, else Transformers' own code; each is held to the plain model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kajiya.errors import ConfigError, KajiyaError
from kajiya.serving.native.architecture import FAMILIES, NotNativeError, cache_bytes
from kajiya.serving.native.layout import BLOCK_TOKENS
from kajiya.serving.proof import FALLBACK, compare, plain_logits
from kajiya.serving.proven import Reference, reference_of

if TYPE_CHECKING:
    from kajiya.serving.runner import Runner, TransformersRunner

_CACHE_BYTES = 4 << 30
_WINDOWED = [kind for kind, family in FAMILIES.items() if family.window_of is not None]


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded and driven."""

    precision: str = "auto"
    """auto, fp32 or bf16: of the weights, where they are not quantized."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0 or mps."""
    max_batch: int = 16
    """Sequences computed together."""
    max_waiting: int = 256
    """Requests that may wait."""
    quantize: str = "none"
    """none, int8 or int4: weights on a CPU, in groups of 32."""
    cache_precision: str = "auto"
    """auto (that of the weights; bf16 where those are quantized), fp32, bf16 or int8: keys and values."""
    cache_tokens: int | None = None
    """Positions in the key-value cache; `None`: the batch at full length, in 4 GiB at most."""
    guesses: int = 0
    """Tokens guessed and confirmed together in a step; 0: none."""
    draft: str | None = None
    """Folder of a smaller model with the same tokens that guesses; `None`: the text so far does."""


@dataclass(frozen=True)
class Driven:
    """What computes a model."""

    runner: "Runner"
    note: str
    """It and why it is that, in words."""
    context_tokens: int
    """The longest text that it takes."""
    n_tokens: int
    """Size of the vocabulary."""
    reference: Reference | None = None
    """What the native decoder was held to."""


def drive(model: Any, opts: EngineOptions, runner: str) -> Driven:
    config = model.config.get_text_config()
    if runner != "plain":
        _refuse_endless(config)
    driven = _choose_runner(model, config, opts, runner)
    unscaled = _unscaled_tokens(config)
    if runner == "plain" or unscaled is None or unscaled >= driven.context_tokens:
        return driven
    longest = f"texts of {unscaled} tokens at most, of {driven.context_tokens} with serve.runner=plain (longrope)"
    return replace(driven, context_tokens=unscaled, note=f"{driven.note}; {longest}")


def _choose_runner(model: Any, config: Any, opts: EngineOptions, runner: str) -> Driven:
    from kajiya.serving.runner import PlainRunner, TransformersRunner

    longest = getattr(config, "max_position_embeddings", None)
    if runner == "plain":
        _refuse_native_settings(model, opts, runner, "")
        plain = PlainRunner(model, _n_blocks(longest, opts, None))
        return Driven(plain, plain.name, longest or plain.n_blocks * plain.block_tokens, config.vocab_size)
    why = ""
    if runner in ("auto", "native"):
        try:
            if model.device.type != "cpu":
                raise NotNativeError(f"it computes on a CPU, not on {model.device}")
            reference = reference_of(model, weights_form(opts, model.dtype))
            return drive_native(reference, model.state_dict(), opts, precision_of(model.dtype))
        except ConfigError:
            raise  # no other runner makes room for a cache
        except KajiyaError as error:
            if runner == "native":
                raise KajiyaError(f"The native decoder cannot drive this model: {error}") from error
            why = str(error)
    _refuse_native_settings(model, opts, TransformersRunner.name, why)
    _refuse_layers(model, config)
    n_blocks = _n_blocks(longest, opts, _torch_block_bytes(config, model.dtype))
    # What the plain model says, before its attention is exchanged for the cache's.
    plain_TV = plain_logits(model)
    is_static = model.device.type == "cuda"
    try:
        found = _transformers(model, n_blocks, plain_TV, is_static)
    except KajiyaError as error:
        if not is_static:
            raise
        found = _transformers(model, n_blocks, plain_TV, False)
        why = f"without CUDA graphs: {error}"
    if found.decoder is not None and found.decoder.problem:
        why = found.decoder.problem
    note = f"{found.name}: {why}" if why else found.name
    return Driven(found, note, longest or n_blocks * found.block_tokens, config.vocab_size)


def _transformers(model: Any, n_blocks: int, plain_TV: torch.Tensor, is_static: bool) -> "TransformersRunner":
    from kajiya.serving.runner import TransformersRunner

    kind = model.config.model_type
    try:
        found = TransformersRunner(model, n_blocks, is_static)
        compare(found, plain_TV, precision_of(model.dtype), kind)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise KajiyaError(f"The engine cannot drive a {kind} model: {error}\n{FALLBACK}") from error
    return found


def _refuse_native_settings(model: Any, opts: EngineOptions, runner: str, why: str) -> None:
    """Raise `ConfigError` for settings that the native decoder alone follows; `why` says why it does not drive this model."""
    reason = f"The native decoder cannot drive this model: {why}\n" if why else ""
    if opts.quantize != "none":
        problem = f"{opts.quantize!r} needs the native decoder; the runner {runner} leaves weights as they are"
        raise ConfigError("serve.quantize", problem, f"{reason}Leave it out, or serve with serve.runner=auto on a CPU.")
    if opts.cache_precision not in ("auto", precision_of(model.dtype)):
        problem = (
            f"{opts.cache_precision!r} needs the native decoder; the runner {runner} keeps the precision of the weights"
        )
        raise ConfigError("serve.cache_precision", problem, f"{reason}Leave it out, or set serve.precision.")


def drive_native(
    reference: Reference, tensors: Mapping[str, torch.Tensor], opts: EngineOptions, precision: str
) -> Driven:
    """The C++ decoder over these weights, which are in `precision`, once it says what the reference does."""
    from kajiya.serving.native.model import NativeModel
    from kajiya.serving.native.runner import NativeRunner

    weights = precision if opts.quantize == "none" else opts.quantize
    cache = opts.cache_precision
    if cache == "auto":
        cache = precision if opts.quantize == "none" else "bf16"
    architecture = reference.architecture
    n_blocks = _n_blocks(architecture.max_position_embeddings, opts, cache_bytes(architecture, cache))
    native = NativeModel(architecture, reference.rotaries, weights, cache, n_blocks)
    native.load(tensors)
    runner = NativeRunner(native, n_blocks)
    held_to = "bf16" if weights == "fp32" != cache else weights
    compare(runner, reference.plain, held_to, architecture.model_type)
    note = f"native, weights in {weights}, cache in {cache}"
    return Driven(runner, note, architecture.max_position_embeddings, architecture.vocab_size, reference)


def weights_form(opts: EngineOptions, dtype: torch.dtype) -> str:
    return precision_of(dtype) if opts.quantize == "none" else opts.quantize


def _n_blocks(longest: int | None, opts: EngineOptions, block_bytes: int | None) -> int:
    """Blocks of the cache; `None` bytes: of a runner without one, for which they only bound what is held."""
    if opts.cache_tokens is not None:
        return -(-opts.cache_tokens // BLOCK_TOKENS)
    per_sequence = -(-(longest or 4096) // BLOCK_TOKENS)
    whole = opts.max_batch * per_sequence
    return whole if block_bytes is None else max(min(whole, _CACHE_BYTES // block_bytes), min(per_sequence, 64))


def _torch_block_bytes(config: Any, dtype: torch.dtype) -> int:
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * n_heads * width * BLOCK_TOKENS * dtype.itemsize)


def precision_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _unscaled_tokens(config: Any) -> int | None:
    """Tokens past which all positions of a text are scaled anew (arXiv:2402.13753), those that are cached already too."""
    scaled = config.to_dict().get("rope_parameters") or {}
    kinds = [scaled, *(value for value in scaled.values() if isinstance(value, dict))]
    found = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(found, default=None)


def _refuse_endless(config: Any) -> None:
    if "max_position_embeddings" not in config.to_dict() and "max_position_embeddings" not in config.attribute_map:
        raise KajiyaError(
            f"The engine cannot serve a {config.model_type} model: it declares no max_position_embeddings.\n{FALLBACK}"
        )


def _refuse_layers(model: Any, config: Any) -> None:
    """Raise `KajiyaError` for layers that see less than the text before them, unless they tell the cache's attention so."""
    values = config.to_dict()
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    window = values.get("sliding_window")
    if not kinds and window and values.get("use_sliding_window", True) and window < config.max_position_embeddings:
        kinds = {"sliding_attention"}
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.window_of is not None:
        kinds -= {"sliding_attention"}
    if kinds:
        raise KajiyaError(
            f"The engine cannot serve this {config.model_type} model: it has layers of kind {', '.join(sorted(kinds))}; "
            f"it knows full attention, and sliding_attention of {', '.join(_WINDOWED)}.\n{FALLBACK}"
        )
