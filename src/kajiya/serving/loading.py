"""From a folder to an engine: the runner that drives its model, and the proof that it does so as Transformers would."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError, KajiyaError
from kajiya.models.origin import origin_of
from kajiya.run.process import has_bf16_instructions
from kajiya.serving.draft_model import DraftModel
from kajiya.serving.drafts import Drafter, PromptLookup
from kajiya.serving.engine import Engine, ModelFacts
from kajiya.serving.proof import FALLBACK, compare, plain_logits
from kajiya.serving.runner import BLOCK_TOKENS, PlainRunner, Runner, TransformersRunner

_CACHE_BYTES = 4 << 30


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


def load_engine(folder: Path, *, options: EngineOptions | None = None, runner: str = "auto", **settings: Any) -> Engine:
    """An engine over the model in `folder` (anything that plain `from_pretrained` loads; safetensors only).

    `settings` are fields of `EngineOptions`, for those who do not hold one. `runner` is auto (native, else
    transformers), native, transformers or plain. Raises `KajiyaError` for a folder that does not load or a model that the
    runner cannot drive exactly.
    """
    opts = options or EngineOptions(**settings)
    from kajiya.data.tokenizer import load_tokenizer
    from kajiya.models.adapter_files import is_adapter
    from kajiya.models.open import open_model

    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ConfigError("model", f"{str(folder)!r} is no folder with a saved model (config.json is missing)")
    device = pick_device(opts.device)
    dtype = pick_dtype(opts.precision, device)
    drafter: Drafter | None = PromptLookup(opts.guesses) if opts.guesses else None
    if opts.draft is not None:
        n_tokens = _same_tokens(folder, Path(opts.draft), opts)
        smaller = open_model(Path(opts.draft), dtype, "eager", is_merged=True).to(device)
        found, _, context = _drive(smaller, opts, runner)
        drafter = DraftModel(found, opts.guesses, context, n_tokens)
    model = open_model(folder, dtype, "eager", is_merged=True).to(device)
    return engine_of(model, end_tokens(load_tokenizer(folder), model), opts, runner, drafter)


def engine_of(
    model: Any, eos_ids: frozenset[int], opts: EngineOptions, runner: str = "auto", drafter: Drafter | None = None
) -> Engine:
    """An engine over a Transformers model in memory; the native runner packs its weights and lets go of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, note, context = _drive(model, opts, runner)
    n_tokens = model.config.get_text_config().vocab_size
    facts = ModelFacts(context, n_tokens, eos_ids, shapes, note, origin_of(model))
    return Engine(found, facts, opts.max_batch, opts.max_waiting, drafter)


def _drive(model: Any, opts: EngineOptions, runner: str) -> tuple[Runner, str, int]:
    """What computes the model, in words too, and the longest text that it takes."""
    config = model.config.get_text_config()
    if runner != "plain":
        _refuse_unsupported(config)
    found, note = _choose_runner(model, config, opts, runner)
    return found, note, getattr(config, "max_position_embeddings", None) or found.n_blocks * found.block_tokens


def _same_tokens(folder: Path, draft: Path, opts: EngineOptions) -> int:
    """How many tokens model and draft have in common: all, without the padding of their tables.

    Raises `ConfigError` where the draft's guesses would mean something else to the model, or none are asked for.
    """
    from transformers import AutoTokenizer

    if not opts.guesses:
        raise ConfigError("serve.draft", "guesses nothing", "Say how many tokens it guesses: serve.guesses=4.")
    if not (draft / "config.json").is_file():
        raise ConfigError("serve.draft", f"{str(draft)!r} is no folder with a saved model (config.json is missing)")
    mine, its = (AutoTokenizer.from_pretrained(each).get_vocab() for each in (folder, draft))
    if mine != its:
        n_other = len(mine.items() ^ its.items())
        raise ConfigError(
            "serve.draft",
            f"{str(draft)!r} has other tokens than the model ({n_other} differ)",
            "Train the draft with the model's tokenizer, or leave serve.draft out: the text so far guesses then.",
        )
    return max(mine.values()) + 1


def _choose_runner(model: Any, config: Any, opts: EngineOptions, runner: str) -> tuple[Runner, str]:
    if runner == "plain":
        _refuse_native_settings(model, opts, runner, "")
        return PlainRunner(model, _n_blocks(config, opts, None)), PlainRunner.name
    why = ""
    if runner in ("auto", "native"):
        try:
            return _native(model, config, opts)
        except KajiyaError as error:
            if runner == "native":
                raise KajiyaError(f"The native decoder cannot drive this model: {error}") from error
            why = str(error)
    _refuse_native_settings(model, opts, TransformersRunner.name, why)
    n_blocks = _n_blocks(config, opts, _torch_block_bytes(config, model.dtype))
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
    return found, f"{found.name}: {why}" if why else found.name


def _transformers(model: Any, n_blocks: int, plain_TV: torch.Tensor, is_static: bool) -> TransformersRunner:
    kind = model.config.model_type
    try:
        found = TransformersRunner(model, n_blocks, is_static)
        compare(found, plain_TV, _precision(model.dtype), kind)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise KajiyaError(f"The engine cannot drive a {kind} model: {error}\n{FALLBACK}") from error
    return found


def _refuse_native_settings(model: Any, opts: EngineOptions, runner: str, why: str) -> None:
    """Raise `ConfigError` for settings that the native decoder alone follows; `why` says why it does not drive this model."""
    reason = f"The native decoder cannot drive this model: {why}\n" if why else ""
    if opts.quantize != "none":
        problem = f"{opts.quantize!r} needs the native decoder; the runner {runner} leaves weights as they are"
        raise ConfigError("serve.quantize", problem, f"{reason}Leave it out, or serve with serve.runner=auto on a CPU.")
    if opts.cache_precision not in ("auto", _precision(model.dtype)):
        problem = (
            f"{opts.cache_precision!r} needs the native decoder; the runner {runner} keeps the precision of the weights"
        )
        raise ConfigError("serve.cache_precision", problem, f"{reason}Leave it out, or set serve.precision.")


def _native(model: Any, config: Any, opts: EngineOptions) -> tuple[Runner, str]:
    from kajiya.serving.native.model import NativeModel, NotNativeError, cache_bytes, require_native
    from kajiya.serving.native.runner import NativeRunner

    if model.device.type != "cpu":
        raise NotNativeError(f"it computes on a CPU, not on {model.device}")
    require_native(config)
    precision = _precision(model.dtype)
    weights = precision if opts.quantize == "none" else opts.quantize
    cache = opts.cache_precision
    if cache == "auto":
        cache = precision if opts.quantize == "none" else "bf16"
    n_blocks = _n_blocks(config, opts, cache_bytes(config, cache))
    native = NativeModel(config, model.model.rotary_emb, weights, cache, n_blocks)
    native.load(model.state_dict())
    runner = NativeRunner(native, n_blocks)
    held_to = "bf16" if weights == "fp32" != cache else weights
    compare(runner, plain_logits(model, weights), held_to, config.model_type)
    return runner, f"native, weights in {weights}, cache in {cache}"


def _n_blocks(config: Any, opts: EngineOptions, block_bytes: int | None) -> int:
    """Blocks of the cache; `None` bytes: of a runner without one, for which they only bound what is held."""
    if opts.cache_tokens is not None:
        return -(-opts.cache_tokens // BLOCK_TOKENS)
    context = getattr(config, "max_position_embeddings", None) or 4096
    per_sequence = -(-context // BLOCK_TOKENS)
    whole = opts.max_batch * per_sequence
    return whole if block_bytes is None else max(min(whole, _CACHE_BYTES // block_bytes), min(per_sequence, 64))


def _torch_block_bytes(config: Any, dtype: torch.dtype) -> int:
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * n_heads * width * BLOCK_TOKENS * dtype.itemsize)


def _precision(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def pick_device(device: str) -> torch.device:
    """The device of that name; `auto` is CUDA, then MPS, then the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError("serve.device", f"{device!r} is no device", "Known: auto, cpu, cuda, cuda:0, mps.") from error
    missing = (target.type == "cuda" and not torch.cuda.is_available()) or (
        target.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ConfigError("serve.device", f"{device!r} is not on this machine", "serve.device=cpu always works.")
    return target


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Precision of the weights; `auto` is bf16 where the hardware has instructions for it, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        # Not measured as in training: a decoding step is bound by reading the weights, of which bf16 has half the bytes.
        if device.type == "cpu" and has_bf16_instructions():
            return torch.bfloat16
        return torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def end_tokens(tokenizer: Any, model: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's, and those the model's generation settings name."""
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


def _refuse_unsupported(config: Any) -> None:
    values = config.to_dict()
    if "max_position_embeddings" not in values and "max_position_embeddings" not in config.attribute_map:
        raise KajiyaError(
            f"The engine cannot serve a {config.model_type} model: it declares no max_position_embeddings.\n{FALLBACK}"
        )
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    window = values.get("sliding_window")
    if not kinds and window and values.get("use_sliding_window", True) and window < config.max_position_embeddings:
        kinds = {"sliding_attention"}
    if kinds:
        raise KajiyaError(
            f"The engine cannot serve this {config.model_type} model: it has layers of kind {', '.join(sorted(kinds))}, "
            f"and only full attention is supported.\n{FALLBACK}"
        )
