"""Rows of the key-value cache: which sequence holds which, kept without holes; free of tensors."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Move:
    """Copy the first `length` cached positions of row `source` to row `target`."""

    source: int
    target: int
    length: int


@dataclass
class Slots:
    """The rows 0 … n−1 that are in use, of at most `capacity`, each with its holder.

    Rows in use have no holes, so that a batch is a plain slice of the cache and never a copy of it: when a row is given
    back, the last one takes its place.
    """

    capacity: int
    holders: list[str] = field(default_factory=list)

    @property
    def n_free(self) -> int:
        return self.capacity - len(self.holders)

    def take(self, holder: str) -> int:
        """The next row, now held by `holder`."""
        assert self.n_free > 0
        self.holders.append(holder)
        return len(self.holders) - 1

    def give_back(self, row: int) -> str | None:
        """Free a row; returns the holder that must move from the last row into it, if any."""
        last = self.holders.pop()
        if row == len(self.holders):
            return None
        self.holders[row] = last
        return last
