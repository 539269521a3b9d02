"""A task answered by a model: figures with intervals, every row kept, and a fingerprint of all that the figures depend on."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.tables import import_target, resolve
from kajiya.errors import DataError, MissingExtraError, StoreError
from kajiya.evals.answers import Answer, Respondent, Sampling
from kajiya.evals.metrics import Measured
from kajiya.evals.statistics import Comparison, Scores, compare, interval, ratio_scores
from kajiya.evals.tasks import Row, Task, choices_of, render, rows_digest
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce


@dataclass(frozen=True)
class Fingerprint:
    """What a figure depends on beside the model's skill; figures of different ones are no comparison."""

    data: str
    """Digest of the rows."""
    template: str
    """Digest of prompts, choices, targets and metrics."""
    engine: str
    dtype: str
    sampling: str
    """Digest of how answers are drawn."""
    model: str
    """Digest of the model's files, or an endpoint's address and model name."""

    def differences(self, other: "Fingerprint") -> list[str]:
        """Names of the fields, the model left out, in which two evaluations are not alike."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name != "model" and mine[name] != theirs[name]]


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
    """The artifact of a task under a model, and whether it was there already; an endpoint (a string) is always asked anew.

    Files: `result.json` (figures, intervals, signatures, fingerprint), `rows.parquet` (every prompt and answer, and what the
    figures are made of, for paired tests).
    """
    task = question.task
    fingerprint = Fingerprint(
        data=rows_digest(question.rows),
        template=task.template_digest,
        engine=respondent.engine,
        dtype=respondent.dtype,
        sampling=digest(asdict(question.sampling)),
        model=model if isinstance(model, str) else model.digest,
    )

    def make(folder: Path) -> dict[str, Any]:
        result = measure_task(question, respondent, folder) | {"fingerprint": asdict(fingerprint)}
        write_json(folder / "result.json", result)
        return result

    asked_at = time.time_ns() if isinstance(model, str) else None
    return produce(
        store,
        "task",
        code=code_revision("kajiya.evals.run_task"),
        config={"task": asdict(task) | {"folder": None}, "fingerprint": asdict(fingerprint), "asked_at": asked_at},
        parents={} if isinstance(model, str) else {"model": model},
        make=make,
    )


def measure_task(question: Question, respondent: Respondent, folder: Path | None = None) -> dict[str, Any]:
    """Ask and measure: `task`, `n_rows`, `n_groups`, `figures` with intervals, `seconds`; with a folder, `rows.parquet` in it."""
    began = time.perf_counter()
    task = question.task
    answers = ask(question, respondent)
    measured: dict[str, Measured] = {}
    for name in task.metrics:
        found = _measure(name, answers, task)
        measured |= {name: found, **found.more}
    groups = groups_of(task, answers)
    figures = {name: _figure(each, groups) for name, each in measured.items()}
    if folder is not None:
        _write_rows(folder / "rows.parquet", answers, measured, groups)
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


def _measure(name: str, answers: Sequence[Answer], task: Task) -> Measured:
    metric, _ = resolve("metric", name, {}, f"{task.name}.metrics")
    measured: Measured = metric(answers, task)
    return measured


def _figure(measured: Measured, groups: Sequence[str] | None) -> dict[str, Any]:
    low, high = interval(measured.scores, groups)
    value = measured.scores.value()
    return {
        "value": value if np.isfinite(value) else None,
        "interval": [low, high] if np.isfinite([low, high]).all() else None,
        "is_lower_better": measured.scores.is_lower_better,
        "is_mean": measured.scores.is_mean,
        "signature": measured.signature,
        "details": measured.details,
    }


def _write_rows(
    path: Path, answers: Sequence[Answer], measured: Mapping[str, Measured], groups: Sequence[str] | None
) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "metrics", "Keeping the rows of an evaluation") from error
    columns: dict[str, list[Any]] = {
        "row": [json.dumps(each.row, ensure_ascii=False, default=str) for each in answers],
        "prompt": [each.prompt for each in answers],
        "target": [each.target for each in answers],
        "answers": [list(each.texts) for each in answers],
        "choices": [list(each.choices) for each in answers],
        "logprobs": [list(each.logprobs) for each in answers],
        "group": list(groups) if groups else [str(i) for i in range(len(answers))],
    }
    for name, each in measured.items():
        columns[f"{name}: statistics"] = each.scores.rows.tolist()
        columns[f"{name}: note"] = list(each.notes) or [""] * len(answers)
    parquet.write_table(pyarrow.table(columns), path)


# ---------------------------------------------------------------- reading back


@dataclass(frozen=True)
class TaskResult:
    """A finished evaluation, read from its artifact."""

    folder: Path
    facts: dict[str, Any]

    @property
    def fingerprint(self) -> Fingerprint:
        """What its figures depend on."""
        return Fingerprint(**self.facts["fingerprint"])

    def rows(self) -> list[dict[str, Any]]:
        """Every row, as the parquet file holds it."""
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(self.folder / "rows.parquet").to_pylist()
        return rows

    def misses(self, metric: str | None = None) -> list[dict[str, Any]]:
        """Rows that the metric (the first, when not said) does not give full marks, the worst first."""
        name = metric or next(iter(self.facts["figures"]))
        if name not in self.facts["figures"]:
            raise StoreError(f"{self.facts['task']} has no metric {name!r}; it has {', '.join(self.facts['figures'])}")
        rows = self.rows()
        first = [row[f"{name}: statistics"][0] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: first[i])
        if not self.facts["figures"][name]["is_lower_better"]:
            return [rows[i] for i in order if first[i] < max(1.0, max(first))]
        return [rows[i] for i in reversed(order) if first[i] > 0]


def compare_results(first: TaskResult, second: TaskResult, metric: str) -> Comparison:
    """Paired comparison of two models on the same rows. Raises `StoreError` when the fingerprints tell them apart."""
    apart = first.fingerprint.differences(second.fingerprint)
    if apart:
        raise StoreError(
            f"{first.facts['task']}: the two evaluations are no comparison, they differ in {', '.join(apart)}.\n"
            "Evaluate both models in the same way."
        )
    rows = first.rows()
    groups = [row["group"] for row in rows]
    alone = len(set(groups)) == len(groups)
    return compare(_scores(first, metric), _scores(second, metric), None if alone else groups)


def _scores(result: TaskResult, metric: str) -> Scores:
    """The metric's scores anew: a mean from what is stored of each row, anything else from the stored answers."""
    rows = result.rows()
    if result.facts["figures"][metric]["is_mean"]:
        values = np.array([row[f"{metric}: statistics"] for row in rows], dtype=np.float64)
        return ratio_scores(values[:, 0], values[:, 1], result.facts["figures"][metric]["is_lower_better"])
    if metric == "clustering":
        raise StoreError("Clusterings are not compared by rows: a model's vectors are not kept.")
    answers = [
        Answer(json.loads(row["row"]), row["prompt"], row["target"], tuple(row["answers"]), tuple(row["choices"]),
               tuple(row["logprobs"]), tuple(len(choice.encode()) for choice in row["choices"]))
        for row in rows
    ]  # fmt: skip
    measure, _ = resolve("metric", metric, {}, "metrics")
    measured: Measured = measure(answers, None)
    return measured.scores
