"""A teacher's most probable tokens for every place of the text, computed once, kept, and looked up in the place of the teacher.

Shape letters: N places of a split, M places of a batch, k tokens of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kajiya.data.batch import Batch, target_places
from kajiya.data.shards import map_array
from kajiya.errors import ConfigError
from kajiya.evals.scoring import evaluation_mode
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.training.losses.sequences import split_head


@dataclass(frozen=True)
class CachedTeacher:
    """The tables of both splits, one behind the other, memory-mapped."""

    ids: np.ndarray
    """Most probable tokens, int32 [N, k]."""
    log_p: np.ndarray
    """Their log-probabilities at the temperature, nats, float32 [N, k]."""
    vocab_size: int

    def look_up(self, sources_M: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (int64) and log-probabilities (float32) of places, both [M, k]."""
        places = sources_M.numpy()
        ids, log_p = (torch.from_numpy(np.asarray(table[places])) for table in (self.ids, self.log_p))
        return ids.long().to(device, non_blocking=True), log_p.to(device, non_blocking=True)


def open_cached_teacher(folder: Path, vocab_size: int) -> CachedTeacher:
    """The tables that `cache_teacher` wrote."""
    return CachedTeacher(map_array(folder / "ids.npy"), map_array(folder / "log_p.npy"), vocab_size)


@dataclass(frozen=True)
class Keeping:
    """How much of a teacher is kept."""

    top_k: int
    temperature: float
    chunk_tokens: int
    n_tokens: int | None = None
    """Tokens of the tokenizer; what the teacher's head has behind them is left out. `None`: all are the tokenizer's."""


def require_top_k(top_k: int, n_tokens: int) -> None:
    """Raise `ConfigError` where no teacher of so many tokens has so many most probable ones."""
    if top_k > n_tokens:
        raise ConfigError(
            "train.loss.options.top_k",
            f"is {top_k:,}, and the teacher knows {n_tokens:,} tokens",
            "Set it far lower (64), or to null: the teacher then runs beside the student.",
        )


@torch.no_grad()
def cache_teacher(
    teacher: Any, splits: Iterable[tuple[int, Iterable[Batch]]], n_places: int, keeping: Keeping, folder: Path
) -> int:
    """Write the tables of `n_places` into `folder`; returns the vocabulary's size.

    `splits` are the place at which each begins and its rows, which together hold every place that can be a target's. A place is
    read with what stands before it in its row. Raises `ConfigError` for more of each than there are tokens.
    """
    device = next(teacher.parameters()).device
    shape = (n_places, keeping.top_k)
    ids_NK = np.lib.format.open_memmap(folder / "ids.npy", mode="w+", dtype=np.int32, shape=shape)
    log_p_NK = np.lib.format.open_memmap(folder / "log_p.npy", mode="w+", dtype=np.float32, shape=shape)
    vocab_size = 0
    with evaluation_mode(teacher):
        for begin, batches in splits:
            for batch in batches:
                if batch.sources is None:
                    raise AssertionError("rows of text say where they are from")
                wanted = target_places(batch.targets)
                places = begin + batch.sources.reshape(-1)[wanted].numpy()
                placed = batch.to(device)
                states, head = (
                    split_head(teacher, placed)
                    if has_split_head(teacher)
                    else (all_logits(teacher, placed).flatten(0, 1), None)
                )
                for part in torch.arange(len(wanted)).split(keeping.chunk_tokens):
                    own = states[wanted[part].to(device)]
                    logits = (own if head is None else own @ head[: keeping.n_tokens].T).float() / keeping.temperature
                    logits = logits[:, : keeping.n_tokens]
                    vocab_size = logits.shape[1]
                    require_top_k(keeping.top_k, vocab_size)
                    found = logits.log_softmax(1).topk(keeping.top_k, dim=1)
                    ids_NK[places[part]] = found.indices.cpu().numpy()
                    log_p_NK[places[part]] = found.values.cpu().numpy()
    ids_NK.flush()
    log_p_NK.flush()
    return vocab_size
