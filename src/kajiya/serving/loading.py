"""Loading a model for the engine, and the proof that the engine drives it as Transformers would."""

from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError, KajiyaError
from kajiya.serving.cache import SLOT_ATTENTION, register_slot_attention
from kajiya.serving.runner import Runner
from kajiya.serving.scheduler import Chunk, Plan
from kajiya.serving.sequence import Request, SamplingParams, new_sequence

_PROBE_TOKENS = 12
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest root mean square difference between the engine's logits and the plain model's, in standard deviations of the
logits. A wrong mask or position makes it about 1; rounding in bf16 reaches a tenth of the tolerance in trained models."""


def load_for_serving(folder: Path, precision: str, device: str) -> Any:
    """The causal language model in `folder`, on its device, in evaluation mode."""
    from kajiya.models.load import load_model

    if not (folder / "config.json").is_file():
        raise ConfigError("model", f"{str(folder)!r} is no folder with a saved model (config.json is missing)")
    register_slot_attention()
    target = pick_device(device)
    model = load_model(folder, dtype=pick_dtype(precision, target), attention="eager").to(target)
    _refuse_unsupported(model.config.get_text_config())
    return model


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
    """Precision of the weights; `auto` is bf16 where the hardware multiplies it faster, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        # As in training: without AMX, bf16 products on a CPU are no faster than fp32 ones.
        if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
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
            f"The engine cannot serve a {config.model_type} model: it declares no max_position_embeddings."
        )
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    window = values.get("sliding_window")
    if not kinds and window and values.get("use_sliding_window", True) and window < config.max_position_embeddings:
        kinds = {"sliding_attention"}
    if kinds:
        raise KajiyaError(
            f"The engine cannot serve this {config.model_type} model: it has layers of kind {', '.join(sorted(kinds))}, "
            "and only full attention is supported."
        )


@torch.inference_mode()
def check_drivable(runner: Runner) -> None:
    """Read a few tokens through the cache, in chunks, beside another row, and compare with the plain model.

    Raises `KajiyaError` when the two disagree: the model's architecture does something that the cache or the
    attention of the engine does not know, and would answer wrongly without a sign.
    """
    model = runner.model
    vocab_size = model.config.get_text_config().vocab_size
    ids = [(7 + 31 * i) % vocab_size for i in range(_PROBE_TOKENS)]
    plain_TV = model(input_ids=torch.tensor([ids], device=runner.device), use_cache=False).logits[0].float()
    kind = model.config.model_type
    try:
        model.set_attn_implementation(SLOT_ATTENTION)
        found_TV = _read_in_chunks(runner, ids).float()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise KajiyaError(f"The engine cannot drive a {kind} model: {error}") from error
    finally:
        runner.cache.drop()
    difference = ((found_TV - plain_TV).square().mean().sqrt() / plain_TV.std().clamp(min=1e-6)).item()
    if not difference <= _TOLERANCE[runner.dtype]:
        raise KajiyaError(
            f"The engine cannot drive a {kind} model: its logits differ from the plain model's by {difference:.2g} "
            f"standard deviations (allowed: {_TOLERANCE[runner.dtype]:g})."
        )


def _read_in_chunks(runner: Runner, ids: list[int]) -> torch.Tensor:
    request = Request("probe", tuple(ids), SamplingParams(max_tokens=0, prompt_logprobs=True))
    sequence = new_sequence(request, frozenset())
    sequence.row = min(1, runner.cache.place.n_rows - 1)
    pieces = []
    for start, count in ((0, 7), (7, 4), (11, 1)):
        pieces.append(runner.run(Plan((), (Chunk(sequence, start, count),)))["probe"])
    return torch.cat(pieces)
