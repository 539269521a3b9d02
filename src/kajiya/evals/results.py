"""Finished evaluations: figures with intervals, every row beside them, read back, browsed and compared in pairs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.tables import resolve
from kajiya.errors import KajiyaError, MissingExtraError, StoreError
from kajiya.evals.answers import Answer
from kajiya.evals.fingerprint import Fingerprint, read_fingerprint
from kajiya.evals.metrics import Measured
from kajiya.evals.metrics_labels import clustering_scores
from kajiya.evals.statistics import (
    Comparison,
    Scores,
    compare,
    comparison_words,
    few_groups_words,
    interval,
    ratio_interval,
    ratio_scores,
    sums_scores,
)
from kajiya.evals.tasks import Task, read_task

ROWS = "rows.parquet"
_LN2 = float(np.log(2))
Figures = dict[str, dict[str, Any]]


# ---------------------------------------------------------------- written


def measure(task: Task, answers: Sequence[Answer]) -> dict[str, Measured]:
    """Each of the task's metrics, and the figures beside them, by name."""
    measured: dict[str, Measured] = {}
    for name in task.metrics:
        metric, _ = resolve("metric", name, {}, f"{task.name}.metrics")
        found: Measured = metric(answers, task)
        measured |= {name: found, **found.more}
    return measured


def figure_of(measured: Measured, groups: Sequence[str] | None, resamples: int = 500) -> dict[str, Any]:
    """A figure with its 95 % interval, as it stands in the facts; `None` where there is none."""
    scores = measured.scores
    bounds, value = interval(scores, groups, resamples=resamples), scores.value()
    few = few_groups_words(len(set(groups)) if groups is not None else len(scores.rows)) if bounds is not None else ""
    return {
        "value": value if np.isfinite(value) else None,
        "interval": list(bounds) if bounds is not None and np.isfinite(bounds).all() else None,
        "is_lower_better": scores.is_lower_better,
        "is_judged": True,
        "is_mean": scores.is_mean,
        "of_sums": scores.of_sums,
        "points": scores.points,
        "signature": "; ".join(word for word in (measured.signature, few) if word),
        "details": measured.details,
    }


def answer_columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """What was asked and answered, one value a row."""
    return {
        "row": [json.dumps(each.row, ensure_ascii=False, default=str) for each in answers],
        "prompt": [each.prompt for each in answers],
        "target": [each.target for each in answers],
        "answers": [list(each.texts) for each in answers],
        "choices": [list(each.choices) for each in answers],
        "logprobs": [list(each.logprobs) for each in answers],
    }


def write_rows(
    folder: Path,
    columns: Mapping[str, list[Any]],
    measured: Mapping[str, Measured],
    groups: Sequence[str] | None,
) -> None:
    """`rows.parquet`: the columns, the source of each row, and of each metric what its figure is made of."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "metrics", "Keeping the rows of an evaluation") from error
    n = len(next(iter(columns.values())))
    table: dict[str, Any] = dict(columns) | {"group": list(groups) if groups else [str(i) for i in range(n)]}
    for name, each in measured.items():
        rows = each.scores.rows
        begins = pyarrow.array(np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32))
        table[f"{name}: statistics"] = pyarrow.ListArray.from_arrays(begins, pyarrow.array(rows.ravel()))
        table[f"{name}: note"] = list(each.notes) or [""] * n
    parquet.write_table(pyarrow.table(table), folder / ROWS)


def write_text_rows(
    folder: Path, names: Sequence[str], nats: np.ndarray, n_bytes: np.ndarray, n_targets: np.ndarray
) -> dict[str, Any]:
    """`documents.jsonl` and `rows.parquet` of scored documents, and their figures; the arrays are float64 [documents]."""
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as handle:
        for name, nat, size, count in zip(names, nats, n_bytes, n_targets, strict=True):
            row = {"document": name, "nats": float(nat), "n_bytes": int(size), "n_targets": int(count)}
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    bits = Measured(ratio_scores(nats / _LN2, n_bytes, is_lower_better=True))
    write_rows(folder, {"row": list(names)}, {"bits_per_byte": bits}, None)
    several = len(n_bytes) > 1  # a single document cannot be resampled
    return {
        "bits_per_byte": bits_per_byte(nats, n_bytes),
        "bits_per_byte_interval": list(ratio_interval(nats / _LN2, n_bytes)) if several else None,
        "perplexity": float(np.exp(nats.sum() / n_targets.sum())),
        "perplexity_interval": [float(np.exp(bound)) for bound in ratio_interval(nats, n_targets)] if several else None,
        "nats": float(nats.sum()),
        "n_bytes": int(n_bytes.sum()),
        "n_tokens": int(n_targets.sum()),
        "n_documents": len(n_bytes),
    }


def bits_per_byte(nats: np.ndarray, n_bytes: np.ndarray) -> float:
    """Σ nats / ln 2 / Σ bytes."""
    return float(nats.sum() / _LN2 / n_bytes.sum())


# ---------------------------------------------------------------- read back


@dataclass(frozen=True)
class TaskResult:
    """A finished evaluation, read from its artifact: of a task, or of a model on its own held-out rows."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def task(self) -> str:
        """Its name."""
        return str(self.facts["task"])

    @property
    def figures(self) -> Figures:
        """Its figures by name."""
        figures: Figures = self.facts["figures"]
        return figures

    @property
    def fingerprint(self) -> Fingerprint:
        """What its figures depend on."""
        return read_fingerprint(self.facts)

    def rows(self) -> list[dict[str, Any]]:
        """Every row, as the parquet file holds it. Raises `StoreError` where an older version kept none."""
        from pyarrow import parquet

        if not (self.folder / ROWS).is_file():
            raise StoreError(f"{self.task}: this evaluation kept no rows ({self.folder}); evaluate the model again.")
        rows: list[dict[str, Any]] = parquet.read_table(self.folder / ROWS).to_pylist()
        return rows

    def misses(self, metric: str | None = None) -> list[dict[str, Any]]:
        """Rows that the metric (the first one of single rows, when not said) does not give full marks, the worst first.

        Raises `StoreError` for a metric that says nothing of a single row, as BLEU's, and where there is no other.
        """
        name = self.row_metric(metric)
        rows = [row for row in self.rows() if row[f"{name}: statistics"][1]]
        marks = [total / count for total, count in (row[f"{name}: statistics"] for row in rows)]
        order = sorted(range(len(rows)), key=lambda i: marks[i])
        if not self.figures[name]["is_lower_better"]:
            return [rows[i] for i in order if marks[i] < max(1.0, max(marks))]
        return [rows[i] for i in reversed(order) if marks[i] > 0]

    def row_metric(self, metric: str | None) -> str:
        """The metric that orders single rows: the one asked for, or the first that can. Raises as `misses` does."""
        if metric is not None and metric not in self.figures:
            raise StoreError(f"{self.task} has no metric {metric!r}; it has {', '.join(self.figures)}")
        of_rows = [name for name, figure in self.figures.items() if figure["is_mean"]]
        if metric is None and of_rows:
            return of_rows[0]
        if metric in of_rows:
            return str(metric)
        known = (
            f"those that do: {', '.join(of_rows)}" if of_rows else "add one that does, for example exact_match or f1"
        )
        named = metric or ", ".join(self.figures)
        raise StoreError(f"{self.task}: {named} says nothing of a single row, so rows have no order by it; {known}.")


def text_result(folder: Path, facts: Mapping[str, Any]) -> TaskResult:
    """An evaluation on held-out text as a result that is compared like any other."""
    n = facts["n_documents"]
    few = few_groups_words(n)
    figure = {
        "value": facts["bits_per_byte"], "interval": facts["bits_per_byte_interval"], "is_lower_better": True,
        "is_judged": True, "is_mean": True, "points": None, "details": {},
        "signature": f"windows of {facts['context_tokens']} tokens" + (f"; {few}" if few else ""),
    }  # fmt: skip
    told = {"task": "held-out text", "n_rows": n, "n_groups": n, "figures": {"bits_per_byte": figure}}
    return TaskResult(folder, told | {"fingerprint": facts["fingerprint"]})


# ---------------------------------------------------------------- compared


def compare_results(first: TaskResult, second: TaskResult, metric: str) -> Comparison:
    """Paired comparison of two models on the same rows. Raises `StoreError` when the fingerprints tell them apart."""
    apart = first.fingerprint.differences(second.fingerprint)
    if apart:
        raise StoreError(
            f"{first.task}: the two evaluations are no comparison, they differ in {', '.join(apart)}.\n"
            "Evaluate both models in the same way."
        )
    rows, others = first.rows(), second.rows()
    groups = [row["group"] for row in rows]
    if groups != [row["group"] for row in others]:
        raise StoreError(f"{first.task}: the rows of the two evaluations do not pair up.")
    alone = len(set(groups)) == len(groups)
    a, b = (_scores(result, of, metric) for result, of in ((first, rows), (second, others)))
    return compare(a, b, None if alone else groups)


def compared_words(first: TaskResult, found: Comparison, metric: str, names: tuple[str, str]) -> str:
    """The verdict on a metric in plain words, in points where the metric has some."""
    points = first.figures[metric]["points"]
    scale, unit = (1.0, "") if points is None else (points, "points")
    return comparison_words(found, *names, scale=scale, unit=unit)


def _scores(result: TaskResult, rows: Sequence[Mapping[str, Any]], metric: str) -> Scores:
    """The metric's scores anew: a mean from what is stored of each row, anything else from the stored answers."""
    figure = result.figures[metric]
    if figure["is_mean"]:
        values = np.array([row[f"{metric}: statistics"] for row in rows], dtype=np.float64)
        return ratio_scores(values[:, 0], values[:, 1], figure["is_lower_better"], figure["points"])
    kept = [row.get(f"{metric}: statistics") for row in rows]
    if metric == "clustering":  # the vectors are not kept, the cluster of each row is
        labels, clusters = np.array(kept, dtype=np.int64).T
        return clustering_scores(labels, clusters)
    if figure.get("of_sums") is not None:
        points, worse = figure["points"], figure["is_lower_better"]
        return sums_scores(np.array(kept, dtype=np.float64), figure["of_sums"], worse, points)
    if "settings" not in result.facts:
        raise StoreError(
            f"{result.task}: {metric} is made of all rows at once by lm-eval, and what a row adds to it is not kept, so two models "
            "are not compared by it.\nCompare a metric whose figure is a mean over rows, a perplexity or bits per byte."
        )
    return _measured_anew(read_task(result.facts["settings"]), _answers(rows), metric).scores


def _answers(rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    return [
        Answer(json.loads(row["row"]), row["prompt"], row["target"], tuple(row["answers"]), tuple(row["choices"]),
               tuple(row["logprobs"]), tuple(len(choice.encode()) for choice in row["choices"]))
        for row in rows
    ]  # fmt: skip


def _measured_anew(task: Task, answers: Sequence[Answer], metric: str) -> Measured:
    for name in task.metrics:
        function, _ = resolve("metric", name, {}, f"{task.name}.metrics")
        try:
            found: Measured = function(answers, task)
        except KajiyaError:
            raise
        except Exception as problem:  # the user's own code, which may raise anything
            if ":" not in name:
                raise
            raise StoreError(
                f"{name} fails on the rows that were kept: {type(problem).__name__}: {problem}"
            ) from problem
        if metric == name or metric in found.more:
            return found if metric == name else found.more[metric]
    raise StoreError(f"{task.name} has no metric {metric!r}")
