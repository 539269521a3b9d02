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
from kajiya.serving.runner import BLOCK_TOKENS, PlainRunner, Runner, TransformersRunner
from kajiya.serving.scheduler import Chunk, Plan
from kajiya.serving.sequence import Request, SamplingParams, new_sequence

_PROBE_TOKENS = 23
_PROBE_CHUNKS = (7, 4, 1, 10, 1)
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "int8": 0.15, "int4": 1.0}
"""Largest root mean square difference between the runner's logits and the plain model's, in standard deviations of the
logits. A wrong mask or position makes it about 1.4; rounding to bf16 reaches a tenth of its tolerance in trained models.
In 4 bits a model of random weights may be off by half, so there the same runner is proven in fp32 first."""
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
    return engine_of(model, end_tokens(folder, model), opts, runner, drafter)


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
    why = ""
    if runner in ("auto", "native"):
        try:
            return _native(model, config, opts)
        except KajiyaError as error:
            if runner == "native" or opts.quantize != "none" or opts.cache_precision == "int8":
                needs = "" if runner == "native" else " (weights and caches in 8 or 4 bits need it)"
                raise KajiyaError(f"The native decoder cannot drive this model{needs}: {error}") from error
            why = str(error)
    kind = {"plain": PlainRunner}.get(runner, TransformersRunner)
    n_blocks = _n_blocks(config, opts, _torch_block_bytes(config, model.dtype))
    # What the plain model says, before its attention is exchanged for the cache's.
    plain_TV = None if runner == "plain" else _plain_logits(model)
    try:
        found: Runner = kind(model, n_blocks)
        if plain_TV is not None:
            _compare(found, plain_TV, _precision(model.dtype), config.model_type)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise KajiyaError(f"The engine cannot drive a {config.model_type} model: {error}\n{_FALLBACK}") from error
    return found, f"{found.name}: {why}" if why else found.name


_FALLBACK = "serve.runner=plain serves it without a cache, slowly; serve.engine=vllm hands it to vLLM."


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
    worst = max((weights, "bf16" if cache != "fp32" else "fp32"), key=lambda name: _TOLERANCE[name])
    _compare(runner, _plain_logits(model), worst, config.model_type)
    return runner, f"native, weights in {weights}, cache in {cache}"


def _n_blocks(config: Any, opts: EngineOptions, block_bytes: int) -> int:
    if opts.cache_tokens is not None:
        return -(-opts.cache_tokens // BLOCK_TOKENS)
    context = getattr(config, "max_position_embeddings", None) or 4096
    per_sequence = -(-context // BLOCK_TOKENS)
    return max(min(opts.max_batch * per_sequence, _CACHE_BYTES // block_bytes), min(per_sequence, 64))


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


def end_tokens(folder: Path, model: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's, and those the model's generation settings name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


def _refuse_unsupported(config: Any) -> None:
    values = config.to_dict()
    if "max_position_embeddings" not in values and "max_position_embeddings" not in config.attribute_map:
        raise KajiyaError(
            f"The engine cannot serve a {config.model_type} model: it declares no max_position_embeddings.\n{_FALLBACK}"
        )
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    window = values.get("sliding_window")
    if not kinds and window and values.get("use_sliding_window", True) and window < config.max_position_embeddings:
        kinds = {"sliding_attention"}
    if kinds:
        raise KajiyaError(
            f"The engine cannot serve this {config.model_type} model: it has layers of kind {', '.join(sorted(kinds))}, "
            f"and only full attention is supported.\n{_FALLBACK}"
        )


# ---------------------------------------------------------------- the proof


def _probe_ids(vocab_size: int) -> list[int]:
    return [(7 + 31 * i) % vocab_size for i in range(_PROBE_TOKENS)]


@torch.inference_mode()
def _plain_logits(model: Any) -> torch.Tensor:
    ids = _probe_ids(model.config.get_text_config().vocab_size)
    logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits_TV.float()


def _compare(runner: Runner, plain_TV: torch.Tensor, precision: str, kind: str) -> None:
    """Read a few tokens through the cache, in chunks, and compare with the plain model.

    Raises `KajiyaError` when the two disagree: the model's architecture does something that the runner does not know, and
    would answer wrongly without a sign.
    """
    ids = _probe_ids(plain_TV.shape[1])
    request = Request("probe", tuple(ids), SamplingParams(max_tokens=0, prompt_logprobs=True))
    sequence = new_sequence(request, frozenset())
    # Not in order, as blocks come after a while.
    sequence.blocks = [min(1, runner.n_blocks - 1), 0]
    pieces, start = [], 0
    for count in _PROBE_CHUNKS:
        chunk = Chunk(sequence, start, tuple(ids[start : start + count]))
        pieces.append(runner.run(Plan((), (chunk,)))["probe"].logits.clone())
        start += count
    difference = (torch.cat(pieces) - plain_TV).square().mean().sqrt() / plain_TV.std().clamp(min=1e-6)
    if not difference.item() <= _TOLERANCE[precision]:
        raise KajiyaError(
            f"The engine cannot drive a {kind} model: its logits differ from the plain model's by "
            f"{difference.item():.2g} standard deviations (allowed: {_TOLERANCE[precision]:g}).\n{_FALLBACK}"
        )
