"""Tasks during training: the same evaluation as `kajiya eval --tasks`, of the model as it would be saved at that step."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kajiya.config.schema import Config
from kajiya.data.documents import open_documents
from kajiya.errors import ConfigError, StoreError
from kajiya.evals.answers import LocalModel
from kajiya.evals.run_task import Question, measure_task
from kajiya.evals.tasks import find_task, read_rows
from kajiya.run.store import Artifact
from kajiya.training.generators import undisturbed

if TYPE_CHECKING:
    from kajiya.evals.tasks import Task

_LM_EVAL = "lm-eval:"


@dataclass(frozen=True)
class TaskWatch:
    """Asks the model in training; figures are called `task/<task>/<metric>`."""

    questions: Sequence[Question]
    lm_eval: Sequence[str]
    """Names of lm-eval's tasks, or paths of their YAML files."""
    rows: int
    batch: int
    save: Callable[[Path], object]
    """Writes the model, as it is now, into a folder."""
    beside: Path
    """Folder in which that folder is made, and removed again."""

    @property
    def names(self) -> list[str]:
        """What the tasks are called in the names of figures."""
        return [*(question.task.name for question in self.questions), *self.lm_eval]

    def __call__(self, tell: Callable[[str], object]) -> dict[str, float]:
        """The figures of the model as it is; nothing of the training moves, its random numbers neither.

        A task that cannot be asked now (a judge that does not answer) is told, and has no figures.
        """
        values: dict[str, float] = {}
        with tempfile.TemporaryDirectory(dir=self.beside, prefix=".tasks-") as name, undisturbed():
            folder = Path(name)
            try:
                self.save(folder)
            except (OSError, StoreError) as problem:
                tell(f"train.tasks were not asked, the model could not be written: {problem}")
                return values
            respondent = LocalModel(folder, self.batch)
            asked: dict[str, Callable[[], dict[str, Any]]] = {
                question.task.name: partial(_figures, question, respondent) for question in self.questions
            }
            asked |= {task: partial(self._lm_eval, folder, task) for task in self.lm_eval}
            for task, ask in asked.items():
                try:
                    values |= _named(task, ask())
                except Exception as problem:  # a task's own code, an endpoint: no reason to lose the training
                    tell(f"train.tasks: {task} has no figures of this evaluation: {type(problem).__name__}: {problem}")
        return values

    def _lm_eval(self, folder: Path, task: str) -> dict[str, Any]:
        from kajiya.evals.lm_eval_engine import open_tasks, run_lm_eval
        from kajiya.evals.lm_eval_results import figures_of

        opened = open_tasks([task])
        raw = run_lm_eval(folder, opened, limit=self.rows, batch=self.batch)
        return figures_of(raw, opened.aggregations()).figures


def _figures(question: Question, respondent: LocalModel) -> dict[str, Any]:
    figures: dict[str, Any] = measure_task(question, respondent)["figures"]
    return figures


def _named(task: str, figures: dict[str, Any]) -> dict[str, float]:
    return {f"task/{task}/{name}": float(each["value"]) for name, each in figures.items() if each["value"] is not None}


def open_watch(config: Config, corpus: Artifact, save: Callable[[Path], object], beside: Path) -> TaskWatch | None:
    """What `train.tasks` asks for; `None` where it asks for nothing. Raises `ConfigError`, before a step is spent."""
    names = config.train.tasks
    if not names:
        return None
    if ":" in config.model.name:
        raise ConfigError(
            "train.tasks", "the engine serves models that Transformers can load, not a module of one's own"
        )
    if config.train.loss.name in ("classify", "regress", "reward", "masked", "seq2seq"):
        raise ConfigError(
            "train.tasks", f"are for models that write text, and train.loss={config.train.loss.name} has none"
        )
    tasks = [find_task(name, "train.tasks") for name in names if not name.startswith(_LM_EVAL)]
    _check(config, [task.name for task in tasks])
    documents = open_documents(corpus.path, "heldout") if any(":" in task.rows for task in tasks) else None
    return TaskWatch(
        questions=[_question(task, documents, config) for task in tasks],
        lm_eval=[name.removeprefix(_LM_EVAL) for name in names if name.startswith(_LM_EVAL)],
        rows=config.train.task_rows,
        batch=config.eval.batch,
        save=save,
        beside=beside,
    )


def _question(task: "Task", documents: Any, config: Config) -> Question:
    return Question(task, read_rows(task, documents, config.train.task_rows), config.seed)


def _check(config: Config, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError("train.tasks", f"two tasks are called {twice!r}", "Give one a `name` of its own.")
    lm_eval = [name.removeprefix(_LM_EVAL) for name in config.train.tasks if name.startswith(_LM_EVAL)]
    if lm_eval:
        from kajiya.evals.lm_eval_engine import open_tasks

        try:
            open_tasks(lm_eval)
        except ConfigError as problem:
            raise ConfigError("train.tasks", problem.problem, problem.remedy) from problem
