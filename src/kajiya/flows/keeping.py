"""The checkpoints of one run: saved beside the loop, told when they are whole, gone back to."""

from dataclasses import dataclass
from functools import cached_property

from kajiya.data.progress import OnEvent
from kajiya.errors import StoreError, TrainingError
from kajiya.run.folder import Run
from kajiya.training.checkpoint import (
    checkpoint_name,
    disown_checkpoint,
    frozen_digest,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    of_rhythm,
    ranks_behind,
    step_of,
    take_snapshot,
)
from kajiya.training.fit import Setup
from kajiya.training.generators import gather_generators
from kajiya.training.ranks import Ranks
from kajiya.training.saving import CheckpointWriter
from kajiya.training.state import TrainState

_NONE = -1.0
"""What the first rank says to the others where there is no step to go to."""


@dataclass(frozen=True)
class Keeper:
    """Checkpoints of a run. The first rank writes, and says which one is gone on from; the others read it."""

    run: Run
    setup: Setup
    key: str
    hear: OnEvent
    writer: CheckpointWriter
    ranks: Ranks

    @cached_property
    def frozen(self) -> str | None:
        """Digest of the weights that are not trained; read once, since the run watches that they stay as they are."""
        return frozen_digest(self.setup.model)

    def resume(self) -> TrainState | None:
        """Go on from the newest checkpoint that is whole; a corrupt one is told, and the one before it taken."""
        if not self.ranks.is_first:
            step = int(self.setup.strategy.from_first(_NONE))
            return self._load(step) if step >= 0 else None
        state = self._newest()
        self.setup.strategy.from_first(_NONE if state is None else float(state.step))
        return state

    def _newest(self) -> TrainState | None:
        checkpoints = list_checkpoints(self.run.checkpoints)
        for folder in reversed(checkpoints):
            try:
                return self._load(step_of(folder))
            except StoreError as problem:
                if folder == checkpoints[0]:
                    raise
                self.hear("warning", text=f"{' '.join(str(problem).split())} The checkpoint before it is taken.")
                disown_checkpoint(folder)
        return None

    def _load(self, step: int) -> TrainState:
        folder = self.run.checkpoints / checkpoint_name(step)
        state, position = load_checkpoint(folder, self.setup.model, self.setup.optimizer, self.key, self.ranks.rank)
        self.setup.loader.load_state(position)
        if ranks_behind(folder) != self.ranks.n:
            text = f"{folder.name} was written by {ranks_behind(folder)} processes, and this run has {self.ranks.n}: data and "
            self.hear("note", text=text + "weights go on as they were, the random numbers (dropout) are others")
        return state

    def save(self, state: TrainState, *, wanted: bool = True) -> None:
        """Begin to save the state after this step, unless it is saved; the loop waits for the copy alone.

        Every rank calls it after the same steps; the first says whether it is `wanted`, and the others bring their generators.
        """
        setup = self.setup
        if not setup.strategy.from_first(float(wanted and not self.writer.has(state.step))):
            return
        generators = gather_generators(self.ranks)
        if self.ranks.is_first:
            position = setup.loader.state()
            snapshot = take_snapshot(
                state, setup.model, setup.optimizer, position, self.key, generators, frozen=self.frozen
            )
            self.writer.save(snapshot, state.best_step)

    def tell(self) -> None:
        """Tell what has been written since the last call, and what could not be: the run goes on, the last good one stays."""
        for outcome in self.writer.outcomes():
            if outcome.folder is None:
                kept = list_checkpoints(self.run.checkpoints)
                last = f"the last good one is {kept[-1].name}" if kept else "there is none yet"
                text = f"the checkpoint of step {outcome.step} was not written; {last}. {outcome.problem}"
                self.hear("warning", text=text)
                continue
            path = str(outcome.folder.relative_to(self.run.folder))
            self.hear("checkpoint", step=outcome.step, path=path, bytes=outcome.n_bytes)
            if outcome.problem:
                text = f"the checkpoint of step {outcome.step} was written, but older ones could not be deleted. "
                self.hear("warning", text=text + outcome.problem)

    def take(self, step: int) -> None:
        """The weights of that step's checkpoint, in place of the last ones."""
        self._load(step)

    def finish(self) -> None:
        """Wait for the save in progress, and tell of it."""
        self.writer.wait()
        self.tell()

    def require_saved(self, step: int) -> None:
        """Raise `TrainingError` where the checkpoint of the step that a run is to go on from could not be written."""
        if self.writer.has(step):
            return
        kept = list_checkpoints(self.run.checkpoints)
        where = f"from {kept[-1].name}" if kept else "from its beginning, for no checkpoint could be written"
        raise TrainingError(
            f"stopped behind step {step}, whose checkpoint could not be written (the warning says why): the run would go on "
            f"{where}\nMake room in {self.run.checkpoints}; the same command then goes on."
        )

    def go_back(self, every: int) -> bool:
        """Weights and optimizer of the newest checkpoint of the run's own rhythm; false when there is none yet.

        One that a signal caused is passed over: an uninterrupted run would not have it, and must come out the same.
        """
        step = _NONE
        if self.ranks.is_first:
            self.writer.wait()
            found = of_rhythm(list_checkpoints(self.run.checkpoints), every)
            step = float(step_of(found[-1])) if found else _NONE
        step = self.setup.strategy.from_first(step)
        if step < 0:
            return False
        load_weights(
            self.run.checkpoints / checkpoint_name(int(step)), self.setup.model, self.setup.optimizer, self.key
        )
        return True
