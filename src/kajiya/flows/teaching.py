"""The loss of a run with what it reads beside its batches: a teacher, or what is kept of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kajiya.config.schema import Config
from kajiya.config.tables import check_choice
from kajiya.data.loader import heldout_source
from kajiya.data.shards import open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.bases import loss_without_place
from kajiya.flows.feeding import Data, heldout_begin, open_feeding
from kajiya.models.adapter_files import hub_folder
from kajiya.models.tokenizer_of import has_tokenizer, odd_token, tokenizer_folder
from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, produce
from kajiya.training.losses import Loss, load_loss
from kajiya.training.losses.distill import open_teacher
from kajiya.training.portions import rows_at_once
from kajiya.training.teacher import Keeping, cache_teacher, open_cached_teacher, require_top_k


def load_run_loss(config: Config, data: Data, device: torch.device, store: Store) -> tuple[Loss, Artifact | None]:
    """The config's loss on the device, and what was computed for it once: a teacher's most probable tokens, or `None`."""
    loss = config.train.loss
    if loss.name != "distill":
        return load_loss(loss, device), None
    options = check_choice("loss", loss.name, loss.options, "train.loss")
    n_tokens = _shared_tokens(options, data)
    if options.top_k is None:
        return load_loss(loss, device, n_tokens=n_tokens), None
    if n_tokens is not None:
        require_top_k(options.top_k, n_tokens)
    kept = _build_teacher(config, data, n_tokens, device, store)
    cached = open_cached_teacher(kept.path, kept.facts["vocab_size"])
    return load_loss(loss, device, cached=cached, n_tokens=n_tokens), kept


def _shared_tokens(options: Any, data: Data) -> int | None:
    """Tokens of the one tokenizer of teacher and student; `None` where the teacher's folder has none that could be compared.

    Raises `ConfigError` where they read other tokens.
    """
    if not options.teacher:
        return None
    path = Path(options.teacher)
    folder = tokenizer_folder(path if path.is_dir() else hub_folder(options.teacher, options.teacher_revision))
    if not has_tokenizer(folder):
        return None
    mine = load_tokenizer(data.tokenizer.path)
    token = odd_token(mine, load_tokenizer(folder))
    if token is not None:
        raise ConfigError(
            "train.loss.options.teacher",
            f"{options.teacher} reads other tokens than the student: {token[0]!r} is number {token[1]} for one of them alone",
            f"Set tokenizer.path={options.teacher}, so that both read the same tokens.",
        )
    return len(mine)


def _build_teacher(config: Config, data: Data, n_tokens: int | None, device: torch.device, store: Store) -> Artifact:
    """The teacher's most probable tokens at every place of both splits, made or found.

    Rows are those of the first epoch: a place at which text is cut in a later one is kept as it was read in the first.
    """
    loss = config.train.loss
    options = check_choice("loss", loss.name, loss.options, "train.loss")

    def make(folder: Path) -> dict[str, Any]:
        feeding = open_feeding(config, data, None)
        heldout = heldout_source(data.shards.path, feeding.feed, config.seed)
        begin, at_once = heldout_begin(data), rows_at_once(config.train)
        splits = ((0, _in_turn(feeding.loader().rows, at_once)), (begin, _in_turn(heldout, at_once)))
        n_places = begin + open_split(data.shards.path, "heldout").n_tokens
        keeping = Keeping(options.top_k, options.temperature, options.chunk_tokens, n_tokens)
        vocab_size = cache_teacher(open_teacher(options, device), splits, n_places, keeping, folder)
        return {"vocab_size": vocab_size, "places": n_places}

    made, _ = produce(
        store,
        "teacher",
        code=code_revision("kajiya.training.teacher", "kajiya.flows.teaching"),
        config={
            "teacher": loss_without_place(loss).options["teacher"],
            "revision": options.teacher_revision,
            "dtype": options.teacher_dtype,
            "top_k": options.top_k,
            "temperature": options.temperature,
            "row_tokens": config.data.row_tokens,
            "isolate": config.data.isolate,
            "seed": config.seed,
        },
        parents=data.parents(),
        make=make,
    )
    return made


def _in_turn(rows: Any, at_once: int) -> Iterator[Any]:
    """All rows of a first turn, in the order in which they lie."""
    for first in range(0, rows.n, at_once):
        yield rows.batch(np.arange(first, min(first + at_once, rows.n)))
