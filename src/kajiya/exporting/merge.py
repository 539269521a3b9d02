"""An adapter added to its base, or several models made into one; each result measured beside what it came from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kajiya.config.digest import to_plain
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError, ParityError
from kajiya.exporting.evidence import Row, gather, perplexity
from kajiya.exporting.mixing import Mixing, mix
from kajiya.exporting.parity import compare, distance, require_parity
from kajiya.models.adapter_files import (
    ADAPTER_CONFIG,
    adapter_task,
    base_folder,
    is_mergeable,
    read_base,
)
from kajiya.models.load import DTYPES, load_model
from kajiya.models.open import model_dtype, open_model
from kajiya.models.save import save_model
from kajiya.models.tokenizer_of import odd_token, tokenizer_folder
from kajiya.run.files import read_json

Rows = Sequence[Row]


def merge_adapter(adapter: Path, folder: Path, rows: Rows, *, into: str | None, base: str | None) -> dict[str, Any]:
    """Write the base of `adapter` with the adapter added into `folder`, in the dtype `into` (`None`: the base's own).

    What was written is loaded again and compared with the adapter beside its base on `rows`, in float32 and in 16 bits, each at
    its tolerance of `parity`; no more than two models are held at a time. Returns the certificate. Raises `ParityError` when one
    is past it, `ConfigError` for an adapter that is no change of weights.
    """
    if not is_mergeable(adapter):
        kind = read_json(adapter / ADAPTER_CONFIG)["peft_type"]
        raise ConfigError(
            "merge",
            f"{adapter}: {kind} adds virtual tokens, which are no change of the weights, so they cannot be merged into them",
            "It is evaluated and sampled as it is.",
        )
    found = base_folder(adapter, base)
    stored = model_dtype(found) if into is None else _dtype(into)
    task = adapter_task(adapter, found)
    merged = open_model(adapter, torch.float32, base=base, is_merged=True, task=task)
    save_model(merged.to(stored), load_tokenizer(tokenizer_folder(adapter)), folder)
    longest = getattr(merged.config, "max_position_embeddings", None)
    del merged
    coarser = torch.bfloat16 if stored == torch.float32 else stored
    parent = open_model(adapter, torch.float32, base=base, task=task)
    evidence = gather(parent, rows, task, longest)
    rounding = distance(parent, open_model(adapter, coarser, base=base, task=task), evidence, coarser)
    measured = [
        compare(
            parent,
            load_model(folder, dtype=dtype, task=task),
            evidence,
            stored=stored,
            rounding=None if dtype == stored == torch.float32 else rounding,
        )
        for dtype in (torch.float32, coarser)
    ]
    require_parity("the merged model", measured)
    named = read_base(adapter)
    return {
        "parity": to_plain(measured),
        "dtype": str(stored).removeprefix("torch."),
        "base": "not named by digest: the adapter was made by another tool"
        if named is None
        else "the weights that the adapter was trained beside"
        if named.quantize == "none"
        else f"the exact weights that the {named.quantize} ones stand for, beside which the adapter was trained",
    }


def merge_models(
    models: Sequence[Path], folder: Path, rows: Rows, *, mixing: Mixing, base: Path | None, into: str | None = None
) -> dict[str, Any]:
    """Write the joint model of several (adapters are added to their bases first) into `folder`, in the dtype `into` (`None`: the
    first one's own); returns its figures.

    The perplexity of each and of the joint model on `rows` is measured: a joint model computes what none of them does, so there
    is no parity to hold it to. Raises `ParityError` when its logits are no numbers, `ConfigError` for models whose tokens differ.
    """
    stored = model_dtype(models[0]) if into is None else _dtype(into)
    tokenizer = _one_tokenizer(models if base is None else (*models, base))
    opened = [open_model(path, torch.float32, is_merged=True) for path in models]
    origin = None if base is None else open_model(base, torch.float32, is_merged=True).state_dict()
    perplexities = [perplexity(each, rows) for each in opened]
    mixed = mix([each.state_dict() for each in opened], origin, mixing)
    # Into one whose head is apart from its embedding, where there is such: elsewhere one of the two would be lost.
    joint = next((each for each in opened if not _is_tied(each)), opened[0])
    joint.load_state_dict(mixed)
    save_model(joint.to(stored), tokenizer, folder)
    again = load_model(folder, dtype=torch.float32)
    found = perplexity(again, rows)
    if found is None or not found < float("inf"):
        raise ParityError("the joint model's logits are no numbers.")
    return {
        "mixing": to_plain(mixing),
        "dtype": str(stored).removeprefix("torch."),
        "perplexity": found,
        "parent_perplexities": perplexities,
    }


def _one_tokenizer(models: Sequence[Path]) -> Any:
    """The tokenizer of the first model (of an adapter without one its base's), which is to be that of all."""
    first, *others = (load_tokenizer(tokenizer_folder(path)) for path in models)
    for path, other in zip(models[1:], others, strict=True):
        odd = odd_token(first, other)
        if odd is not None:
            raise ConfigError(
                "merge",
                f"{models[0]} and {path} have other tokens: {odd[0]!r} is number {odd[1]} in one of them alone",
                "Only models of one tokenizer can be made into one.",
            )
    return first


def _is_tied(module: Any) -> bool:
    """Whether the output head is the embedding itself."""
    head = module.get_output_embeddings()
    return head is not None and head.weight is module.get_input_embeddings().weight


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError("--into", f"{name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]
