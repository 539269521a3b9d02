"""A task answered by a model: figures with intervals, every row kept, and a fingerprint of all that the figures depend on."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.tables import TABLES, import_target
from kajiya.errors import DataError
from kajiya.evals.answers import Answer, Respondent, Sampling
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.fingerprint import Fingerprint
from kajiya.evals.replies import kept_replies
from kajiya.evals.results import answer_columns, figure_of, measure, write_rows
from kajiya.evals.tasks import Row, Task, choices_of, render, rows_digest
from kajiya.run.code import code_revision, own_code
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce


@dataclass(frozen=True)
class Question:
    """A task's rows, ready to be asked."""

    task: Task
    rows: Sequence[Row]
    seed: int

    @property
    def sampling(self) -> Sampling:
        """How its answers are drawn."""
        task = self.task
        return Sampling(task.max_tokens, task.temperature, self.seed, task.samples, task.stop, task.is_chat)


def evaluate_task(
    question: Question, respondent: Respondent, model: Artifact | str, store: Store
) -> tuple[Artifact, bool]:
    """The artifact of a task under a model, and whether it was there already.

    An endpoint (its `model` a string) is always asked anew, but for the replies to an earlier attempt that broke off.

    Files: `result.json` (figures, intervals, signatures, fingerprint), `rows.parquet` (every prompt and answer, and what the
    figures are made of, for paired tests).
    """
    task = question.task
    fingerprint = Fingerprint(
        data=rows_digest(question.rows),
        template=task.template_digest,
        code=digest(own_code(name for name in task.functions if not _is_packaged(name))),
        engine=respondent.engine,
        dtype=respondent.dtype(task.kind),
        sampling=digest(asdict(question.sampling)),
        model=model if isinstance(model, str) else model.digest,
    )

    def make(folder: Path, respondent: Respondent) -> dict[str, Any]:
        result = measure_task(question, respondent, folder)
        result |= {"fingerprint": asdict(fingerprint), "settings": task.settings()}
        write_json(folder / "result.json", result)
        return result

    code, asked = task_revision(task), {"task": asdict(task) | {"folder": None}, "fingerprint": asdict(fingerprint)}
    if isinstance(respondent, Endpoint):
        with kept_replies(store, asked) as replies:
            made = partial(make, respondent=respondent.remembering(replies))
            config: dict[str, Any] = asked | {"asked_at": time.time_ns()}
            return produce(store, "task", code=code, config=config, parents={}, make=made)
    assert isinstance(model, Artifact)
    config = asked | {"asked_at": None}
    made = partial(make, respondent=respondent)
    return produce(store, "task", code=code, config=config, parents={"model": model}, make=made)


def task_revision(task: Task) -> str:
    """The revision of the code that asks and scores, the task's metrics among it, which are found by name alone."""
    named = [TABLES["metric"][name].target for name in task.metrics if ":" not in name]
    named += [name for name in task.functions if _is_packaged(name)]
    modules = sorted({name.partition(":")[0] for name in named})
    return code_revision("kajiya.evals.run_task", *modules)


def _is_packaged(name: str) -> bool:
    return name.startswith("kajiya.")


def measure_task(question: Question, respondent: Respondent, folder: Path | None = None) -> dict[str, Any]:
    """Ask and measure: `task`, `n_rows`, `n_groups`, `figures` with intervals, `seconds`; with a folder, `rows.parquet` in it."""
    began = time.perf_counter()
    task = question.task
    answers = ask(question, respondent)
    measured = measure(task, answers)
    groups = groups_of(task, answers)
    figures = {name: figure_of(each, groups) for name, each in measured.items()}
    if folder is not None:
        write_rows(folder, answer_columns(answers), measured, groups)
    return {
        "task": task.name, "n_rows": len(answers), "n_groups": len(set(groups)) if groups else len(answers),
        "figures": figures, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def ask(question: Question, respondent: Respondent) -> list[Answer]:
    """Every row's answer."""
    task = question.task
    prompts = [render(task, task.prompt, row) for row in question.rows]
    targets = [render(task, task.target, row) for row in question.rows]
    pairs = zip(question.rows, prompts, targets, strict=True)
    if task.kind == "choose":
        choices = [choices_of(task, row) for row in question.rows]
        scores = respondent.choose(prompts, choices)
        return [
            Answer(
                row, prompt, target, (each[int(np.argmax(s))],), tuple(each), s, tuple(len(c.encode()) for c in each)
            )
            for (row, prompt, target), each, s in zip(pairs, choices, scores, strict=True)
        ]
    if task.kind == "embed":
        vectors = zip(respondent.embed(prompts), respondent.embed(targets), strict=True)
        return [Answer(*each, texts=("",), vectors=both) for each, both in zip(pairs, vectors, strict=True)]
    texts = respondent.complete(prompts, question.sampling)
    if task.function is not None:
        change = import_target(task.function, f"{task.name}.function")
        texts = [tuple(change(row, text) for text in each) for row, each in zip(question.rows, texts, strict=True)]
    return [Answer(*each, texts=text) for each, text in zip(pairs, texts, strict=True)]


def groups_of(task: Task, answers: Sequence[Answer]) -> list[str] | None:
    """The source of each row; `None` where rows stand alone. Raises `DataError` for a row without the key."""
    if task.group is None:
        return None
    missing = next((each for each in answers if task.group not in each.row), None)
    if missing is not None:
        raise DataError(f"{task.name}: a row has no key {task.group!r}, which `group` names.")
    return [str(each.row[task.group]) for each in answers]
