"""lm-eval's results in the shape of the project's own: figures with intervals over rows, every row kept, for groups too."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from kajiya.evals.metrics import Measured
from kajiya.evals.results import Figures, figure_of
from kajiya.evals.statistics import OF_SUMS, Scores, ratio_scores, sums_scores

_RESAMPLES = 100
"""Of a figure that is no mean: lm-eval's own functions take their time."""
Sample = Mapping[str, Any]
Aggregations = Mapping[str, Mapping[str, Callable[[Sequence[Any]], float]]]


@dataclass(frozen=True)
class LmEvalFigures:
    """What lm-eval says of a task, of a group, or of several tasks under one name."""

    figures: Figures
    columns: dict[str, list[Any]]
    """What was asked and answered, a row of each single task once, whatever filters its answers went through."""
    measured: dict[str, Measured]
    """What a figure that is a mean is made of, over these rows."""

    @property
    def n_rows(self) -> int:
        """Rows of all tasks."""
        return len(self.columns["row"])


def figures_of(raw: Mapping[str, Any], aggregations: Aggregations) -> LmEvalFigures:
    """lm-eval's dictionary, read; `aggregations` has each single task's function from a metric's values to its figure.

    The figures of the one task, or of the one group that stands above all, have lm-eval's names; those of the tasks and groups
    below are named `task: metric`. Each interval is this project's bootstrap over rows of what lm-eval computes of them.
    """
    reading = _Reading(raw, aggregations)
    tops = reading.tops()
    top = tops[0] if len(tops) == 1 else None
    figures: Figures = {}
    measured: dict[str, Measured] = {}
    for name in [*reading.groups(), *raw["samples"]]:
        for key, value in _metrics(raw["results"][name]):
            title = _title(key) if name == top else f"{name}: {_title(key)}"
            whole, own = reading.scores(name, key, value)
            figures[title] = _figure(reading, name, key, value, own)
            if whole is not None:
                measured[title] = Measured(whole)
    return LmEvalFigures(figures, reading.columns(), measured)


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures, by lm-eval's `metric,filter`."""
    for key, value in results.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, Real):
            yield key, float(value)


def _title(key: str) -> str:
    return key.removesuffix(",none")


def _figure(reading: "_Reading", name: str, key: str, value: float, scores: Scores | None) -> dict[str, Any]:
    # Where the rows do not make the figure it stands for itself, as a single row, and so has no interval.
    alone = Scores(np.zeros((1, 1)), lambda _: value, is_lower_better=reading.is_lower_better(name, key))
    signature = f"lm-eval version {reading.raw['versions'][name]}"
    figure = figure_of(Measured(scores or alone, signature), None, resamples=_RESAMPLES)
    return figure | {"value": value if math.isfinite(value) else None}


@dataclass
class _Reading:
    """The samples of every single task, each row once, and where they stand among all rows."""

    raw: Mapping[str, Any]
    aggregations: Aggregations
    begins: dict[str, int] = field(init=False)
    n_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.begins, self.n_rows = {}, 0
        for name in self.raw["samples"]:
            self.begins[name] = self.n_rows
            self.n_rows += len(self._first_filter(name))

    def groups(self) -> list[str]:
        """Groups that have figures of their own."""
        return [name for name in self.raw["group_subtasks"] if name in self.raw["results"]]

    def tops(self) -> list[str]:
        """What stands below no group."""
        below = {child for children in self.raw["group_subtasks"].values() for child in children}
        return [name for name in [*self.raw["group_subtasks"], *self.raw["samples"]] if name not in below]

    def is_lower_better(self, name: str, key: str) -> bool:
        """Whether lm-eval says so."""
        said = self.raw["higher_is_better"].get(name) or {}
        return said.get(key.partition(",")[0]) is False

    def scores(self, name: str, key: str, value: float) -> tuple[Scores | None, Scores | None]:
        """The figure's scores over all rows, and over its own; `None` where the rows do not make the figure."""
        leaves = self._leaves(name)
        values = {leaf: found for leaf in leaves if (found := self._values(leaf, key))}
        parts = [[number for each in found if (number := _number(each)) is not None] for found in values.values()]
        worse = self.is_lower_better(name, key)
        if not parts:
            return None, None
        numbers = [each for part in parts for each in part]
        if len(numbers) == sum(map(len, values.values())):
            is_share = not worse and set(numbers) <= {0.0, 1.0}
            points = 100.0 if is_share else None
            if _is_close(float(np.mean(numbers)), value):
                own = ratio_scores(np.array(numbers), np.ones(len(numbers)), worse, points)
                return self._spread(values, own), own
            if _is_close(float(np.mean([np.mean(part) for part in parts])), value):
                return None, _mean_of_means(parts, worse, points)
        sums = _of_sums([each for found in values.values() for each in found], value, worse)
        if sums is not None:
            return self._spread(values, sums), sums
        if name in self.aggregations:
            return None, _aggregated(values[name], self.aggregations[name].get(key.partition(",")[0]), value, worse)
        return None, None

    def _spread(self, values: Mapping[str, Sequence[Any]], own: Scores) -> Scores:
        """The same over all rows: those of other tasks count nothing."""
        rows = np.zeros((self.n_rows, 2))
        places = [self.begins[leaf] + place for leaf, key_rows in values.items() for place in range(len(key_rows))]
        rows[places] = own.rows
        return replace(own, rows=rows)

    def _leaves(self, name: str) -> list[str]:
        children = self.raw["group_subtasks"].get(name)
        return [name] if children is None else [leaf for child in children for leaf in self._leaves(child)]

    def _first_filter(self, name: str) -> list[Sample]:
        samples: list[Sample] = self.raw["samples"][name]
        return [each for each in samples if each["filter"] == samples[0]["filter"]]

    def _values(self, name: str, key: str) -> list[Any]:
        metric, _, kept = key.partition(",")
        found = [each[metric] for each in self.raw["samples"][name] if each["filter"] == kept and metric in each]
        # A document may leave a metric out; then the others have no place among the rows that could be told.
        return found if len(found) == len(self._first_filter(name)) else []

    def columns(self) -> dict[str, list[Any]]:
        """Every row as those of the project's own tasks are kept."""
        rows = [_row(name, each) for name in self.raw["samples"] for each in self._first_filter(name)]
        return {
            key: [row[key] for row in rows] for key in ("row", "prompt", "target", "answers", "choices", "logprobs")
        }


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, np.bool_)):
        return float(value)
    return float(value) if isinstance(value, Real) else None


def _of_sums(items: Sequence[Any], value: float, is_lower_better: bool) -> Scores | None:
    """A perplexity, or bits per byte, of log-likelihoods, alone or each with its words or bytes; `None` of anything else."""
    pairs = [each if _is_list(each) else (each, 1.0) for each in items]
    if not all(len(pair) == 2 and all(_number(each) is not None for each in pair) for pair in pairs):
        return None
    rows = np.array(pairs, dtype=np.float64)
    for name in OF_SUMS:
        scores = sums_scores(rows, name, is_lower_better)
        if rows[:, 1].sum() > 0 and _is_close(scores.value(), value):
            return scores
    return None


def _mean_of_means(parts: Sequence[Sequence[Any]], is_lower_better: bool, points: float | None) -> Scores:
    """A group's unweighted mean over its tasks; two columns a task: sums and counts."""
    rows = np.zeros((sum(map(len, parts)), 2 * len(parts)))
    first = 0
    for number, part in enumerate(parts):
        rows[first : first + len(part), 2 * number] = part
        rows[first : first + len(part), 2 * number + 1] = 1
        first += len(part)

    def figure(sums: np.ndarray) -> float:
        totals, counts = sums[0::2], sums[1::2]
        drawn = counts > 0  # a resample may miss a small task
        return float((totals[drawn] / counts[drawn]).mean())

    return Scores(rows, figure, is_lower_better=is_lower_better, points=points)


def _aggregated(
    items: Sequence[Any], function: Callable[[Sequence[Any]], float] | None, value: float, is_lower_better: bool
) -> Scores | None:
    """A figure that lm-eval's own function makes of the rows' values; `None` where it does not."""
    if function is None or not _is_close(float(function(items)), value):
        return None

    def figure(drawn: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample may lack a class, which some functions tell each time
            return float(function([items[int(place)] for place in drawn[:, 0]]))

    return Scores(np.arange(len(items), dtype=np.float64)[:, None], figure, True, is_lower_better)


def _row(task: str, sample: Sample) -> dict[str, Any]:
    asked = list(sample["arguments"])
    said = list(sample["filtered_resps"])
    scored = [each[0] for each in said if isinstance(each, (tuple, list)) and len(each) == 2]
    is_scored = len(scored) == len(said) and all(isinstance(each, Real) for each in scored)
    choices = [str(each[1]) for each in asked] if is_scored and len(asked[0]) > 1 else []
    if choices:
        answers = [choices[int(np.argmax(scored))]]
    else:
        answers = [""] if is_scored else [str(text) for each in said for text in (each if _is_list(each) else [each])]
    return {
        "row": json.dumps({"task": task, "doc": sample["doc"]}, ensure_ascii=False, default=str),
        "prompt": str(asked[0][0]),
        "target": str(sample["target"]),
        "answers": answers,
        "choices": choices,
        "logprobs": [float(each) for each in scored] if choices else [],
    }


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
