"""Checkpoints written beside the loop, which pays for the copy of the state alone."""

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from kajiya.errors import StoreError
from kajiya.training.checkpoint import Snapshot, list_checkpoints, prune_checkpoints, write_snapshot


@dataclass(frozen=True)
class Outcome:
    """What became of a save: its folder, or why there is none (the disk is full, say)."""

    step: int
    folder: Path | None
    problem: str = ""


class CheckpointWriter:
    """Writes one snapshot at a time on a thread of its own, and prunes behind it. The last good one stays when a write fails."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root = root
        self._keep_last = keep_last
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
        return any(folder.name.endswith(f"-{step:08d}") for folder in list_checkpoints(self.root))

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
            folder = write_snapshot(self.root, snapshot)
            prune_checkpoints(self.root, self._keep_last, best_step)
            self._outcomes.append(Outcome(snapshot.step, folder))
        except (OSError, StoreError) as problem:
            self._outcomes.append(Outcome(snapshot.step, None, " ".join(str(problem).split())))
        except BaseException as problem:
            self._error = problem
