"""Checkpoints written beside the loop, which pays for the copy of the state alone."""

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from kajiya.errors import StoreError
from kajiya.training.checkpoint import Snapshot, list_checkpoints, prune_checkpoints, step_of, write_snapshot


@dataclass(frozen=True)
class Outcome:
    """What became of a save: its folder, or why there is none (the disk is full, say)."""

    step: int
    folder: Path | None
    n_bytes: int = 0
    """Size of the folder, which may have been deleted since."""
    problem: str = ""
    """Why there is no folder; where there is one, why older ones could not be deleted."""


class CheckpointWriter:
    """Writes one snapshot at a time on a thread of its own, and prunes behind it. The last good one stays when a write fails."""

    def __init__(self, root: Path, keep_last: int, save_every: int = 1) -> None:
        self.root = root
        self._keep_last = keep_last
        self._save_every = save_every
        self._thread: Thread | None = None
        self._step = 0
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Begin to write a snapshot, when the one before it is written."""
        self.wait()
        self._step = snapshot.step
        self._thread = Thread(target=self._write, args=(snapshot, best_step), name="checkpoint")
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether this step's checkpoint is written, or being written."""
        if self._thread is not None and self._step == step:
            return True
        return any(step_of(folder) == step for folder in list_checkpoints(self.root))

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> list[Outcome]:
        """What was written or failed since the last call. Raises what is neither a full nor a broken disk."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        if self._error is not None:
            raise self._error
        finished, self._outcomes = self._outcomes, []
        return finished

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            outcome = self._outcome(snapshot, best_step)
            self._outcomes.append(outcome)  # to the list as it is now, for `outcomes` may have taken the one before
        except BaseException as problem:
            self._error = problem

    def _outcome(self, snapshot: Snapshot, best_step: int | None) -> Outcome:
        try:
            folder = write_snapshot(self.root, snapshot)
            n_bytes = sum(path.stat().st_size for path in folder.iterdir())
        except (OSError, StoreError) as problem:
            return Outcome(snapshot.step, None, problem=" ".join(str(problem).split()))
        try:
            prune_checkpoints(self.root, self._keep_last, best_step, self._save_every)
        except OSError as problem:
            return Outcome(snapshot.step, folder, n_bytes, " ".join(str(problem).split()))
        return Outcome(snapshot.step, folder, n_bytes)
