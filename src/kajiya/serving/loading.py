"""From a folder to an engine: the runner that drives its model, and the proof that it does so as Transformers would."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, KajiyaError, StoreError
from kajiya.models.origin import Origin, origin_of
from kajiya.run.process import has_bf16_instructions
from kajiya.serving.draft_model import DraftModel
from kajiya.serving.drafts import Drafter, PromptLookup
from kajiya.serving.driving import Driven, drive, drive_native, precision_of, weights_form
from kajiya.serving.driving import EngineOptions as EngineOptions
from kajiya.serving.engine import Engine, ModelFacts
from kajiya.serving.proven import Proofs, Proven, find_proven, is_stored_plainly, keep_proven, stored_tensors


def load_engine(
    folder: Path,
    *,
    options: EngineOptions | None = None,
    runner: str = "auto",
    proofs: Proofs | None = None,
    **settings: Any,
) -> Engine:
    """An engine over the model in `folder` (anything that plain `from_pretrained` loads; safetensors only).

    `settings` are fields of `EngineOptions`, for those who do not hold one. `runner` is auto (native, else
    transformers), native, transformers or plain. With `proofs`, what the native decoder is held to is kept, and a later start
    loads nothing of Transformers' models. Raises `KajiyaError` for a folder that does not load or a model that the
    runner cannot drive exactly.
    """
    opts = options or EngineOptions(**settings)
    from kajiya.models.adapter_files import is_adapter

    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise ConfigError("model", f"{str(folder)!r} is no folder with a saved model (config.json is missing)")
    device = pick_device(opts.device)
    dtype = pick_dtype(opts.precision, device)
    is_kept = device.type == "cpu" and runner in ("auto", "native") and not is_adapter(folder)
    if proofs is not None and is_kept and opts.draft is None:
        return _proven_engine(folder, opts, runner, dtype, proofs)
    drafter: Drafter | None = PromptLookup(opts.guesses) if opts.guesses else None
    if opts.draft is not None:
        n_tokens = _same_tokens(folder, Path(opts.draft), opts)
        smaller = _open(Path(opts.draft), dtype).to(device)
        driven = drive(smaller, opts, runner)
        drafter = DraftModel(driven.runner, opts.guesses, driven.context_tokens, n_tokens)
    model = _open(folder, dtype).to(device)
    return engine_of(model, end_tokens(load_tokenizer(folder), model), opts, runner, drafter)


def _proven_engine(folder: Path, opts: EngineOptions, runner: str, dtype: torch.dtype, proofs: Proofs) -> Engine:
    """The engine by what was kept at an earlier start; else it is proven by the Transformers model, and that is kept."""
    precision, weights = precision_of(dtype), weights_form(opts, dtype)
    drafter = PromptLookup(opts.guesses) if opts.guesses else None
    proven = find_proven(proofs, precision, weights)
    if proven is not None:
        # What goes wrong here (no compiler, say) goes wrong below too, where it is told and the model is driven otherwise.
        with contextlib.suppress(KajiyaError):
            driven = drive_native(proven.reference, stored_tensors(folder, dtype), opts, precision)
            return _engine(
                driven, proven.eos_ids, opts, drafter, proven.reference.shapes, Origin(str(folder.resolve()))
            )
    model = _open(folder, dtype)
    eos_ids = end_tokens(load_tokenizer(folder), model)
    driven = drive(model, opts, runner)
    if driven.reference is not None and is_stored_plainly(folder, driven.reference):
        try:
            keep_proven(proofs, precision, weights, Proven(driven.reference, eos_ids))
        except (OSError, StoreError) as error:
            driven = replace(driven, note=f"{driven.note} (its proof cannot be kept: {error})")
    return _engine(driven, eos_ids, opts, drafter, _shapes(model), origin_of(model))


def _open(folder: Path, dtype: torch.dtype) -> Any:
    from kajiya.models.open import open_model

    return open_model(folder, dtype, "eager", is_merged=True)


def engine_of(
    model: Any, eos_ids: frozenset[int], opts: EngineOptions, runner: str = "auto", drafter: Drafter | None = None
) -> Engine:
    """An engine over a Transformers model in memory; the native runner packs its weights and lets go of it."""
    return _engine(drive(model, opts, runner), eos_ids, opts, drafter, _shapes(model), origin_of(model))


def _engine(
    driven: Driven,
    eos_ids: frozenset[int],
    opts: EngineOptions,
    drafter: Drafter | None,
    shapes: Mapping[str, tuple[int, ...]],
    origin: Origin | None,
) -> Engine:
    facts = ModelFacts(driven.context_tokens, driven.n_tokens, eos_ids, shapes, driven.note, origin)
    return Engine(driven.runner, facts, opts.max_batch, opts.max_waiting, drafter)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _same_tokens(folder: Path, draft: Path, opts: EngineOptions) -> int:
    """How many tokens model and draft have in common: all, without the padding of their tables.

    Raises `ConfigError` where the draft's guesses would mean something else to the model, or none are asked for.
    """
    if not opts.guesses:
        raise ConfigError("serve.draft", "guesses nothing", "Say how many tokens it guesses: serve.guesses=4.")
    if not (draft / "config.json").is_file():
        raise ConfigError("serve.draft", f"{str(draft)!r} is no folder with a saved model (config.json is missing)")
    mine, its = (load_tokenizer(each).get_vocab() for each in (folder, draft))
    if mine != its:
        n_other = len(mine.items() ^ its.items())
        raise ConfigError(
            "serve.draft",
            f"{str(draft)!r} has other tokens than the model ({n_other} differ)",
            "Train the draft with the model's tokenizer, or leave serve.draft out: the text so far guesses then.",
        )
    return max(mine.values()) + 1


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
