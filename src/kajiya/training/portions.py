"""How the rows of a step are shared out: over the ranks, and over micro-batches."""

from dataclasses import dataclass

from kajiya.config.schema import TrainConfig
from kajiya.errors import ConfigError

AUTO = "auto"
_EVALUATED_AT_ONCE = 8


@dataclass(frozen=True)
class Portions:
    """One rank's part of a step."""

    micro_batch: int
    """Rows that pass through the model at once."""
    accumulate: int
    """Micro-batches of one rank in a step."""
    n_ranks: int = 1

    @property
    def batch_rows(self) -> int:
        """Rows of a step, over all ranks."""
        return self.micro_batch * self.accumulate * self.n_ranks


def rows_of_step(train: TrainConfig) -> int:
    """Rows of one optimizer step, over all ranks and micro-batches: the same whatever the machine."""
    if train.batch_rows is not None:
        return train.batch_rows
    if not isinstance(train.micro_batch, int):
        raise ConfigError(
            "train.batch_rows", "is null, and train.micro_batch=auto needs the rows of a step", "For example 64."
        )
    return train.micro_batch * train.accumulate


def rows_at_once(train: TrainConfig) -> int:
    """Rows that pass through the model at once in evaluation, which a micro-batch that is auto has no part in."""
    return train.micro_batch if isinstance(train.micro_batch, int) else _EVALUATED_AT_ONCE


def share_out(batch_rows: int, micro_batch: int, n_ranks: int) -> Portions:
    """Each rank's micro-batches: at most `micro_batch` rows each, all of one size. Raises `ConfigError` for an uneven share."""
    if batch_rows % n_ranks:
        raise ConfigError(
            "train.batch_rows", f"the {batch_rows} rows of a step cannot be shared out evenly among {n_ranks} processes"
        )
    own = batch_rows // n_ranks
    rows = max(n for n in range(1, min(micro_batch, own) + 1) if own % n == 0)
    return Portions(rows, own // rows, n_ranks)
