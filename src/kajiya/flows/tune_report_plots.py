"""The drawn sections of a study's report: the course of the search, and which settings mattered."""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from kajiya.flows.figures import Bar, BarsData, draw_bars
from kajiya.flows.report_page import Block, Notice
from kajiya.flows.report_results import plot
from kajiya.flows.tune_figures import (
    HistoryData,
    Point,
    RungsData,
    SpaceData,
    draw_contour,
    draw_front,
    draw_history,
    draw_parallel,
    draw_rungs,
    has_surface,
)
from kajiya.flows.tune_results import finished
from kajiya.flows.tune_search import ASHA

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_FEWEST_FOR_IMPORTANCE = 4


def course(study: "Study", metrics: Sequence[str]) -> Iterator[Block]:
    done = finished(study)
    if not done:
        yield Notice("There is no finished trial to draw.")
        return
    if len(metrics) > 1:
        for number, pair in enumerate(combinations(metrics, 2), start=1):
            data = SpaceData("", _front_points(study, metrics), pair, frozenset(), True)
            yield plot(
                "front" if number == 1 else f"front-{number}",
                draw_front,
                data,
                f"{pair[0]} against {pair[1]}",
                "Every finished trial; those that no other beats in all objectives are the front.",
            )
        return
    without = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state.name in ("PRUNED", "FAIL")]
    history = HistoryData(metrics[0], _points(done), _is_lower_better(study), without)
    yield plot(
        "history", draw_history, history, f"{metrics[0]} by trial", "The figure of each finished trial, in their order."
    )
    courses = [
        (t.number, sorted(t.intermediate_values.items()), t.state.name == "COMPLETE")
        for t in study.get_trials(deepcopy=False)
        if t.intermediate_values
    ]
    if courses:
        last = max(points[-1][0] for _, points, _ in courses)
        rungs = study.pruner.rungs(last) if isinstance(study.pruner, ASHA) else []
        yield plot("rungs", draw_rungs, RungsData(metrics[0], courses, rungs), "Trials over evaluations",
                   "The evaluations of every trial during its training; a cross is where one was ended.")  # fmt: skip


def mattered(study: "Study", metrics: Sequence[str], manifest: dict[str, Any]) -> Iterator[Block]:
    done = finished(study)
    keys = [
        key
        for key in dict.fromkeys(k for t in done for k in t.params)
        if len({str(t.params.get(key)) for t in done}) > 1
    ]
    if len(done) < _FEWEST_FOR_IMPORTANCE or not keys:
        yield Notice(f"Too few finished trials ({len(done)}) to say what mattered.")
        return
    shares: dict[str, float] = {}
    for block, found in _importances(study, metrics, keys):
        yield block
        shares = shares or found
    keys = list(shares) or keys
    log_keys = frozenset(each["key"] for each in manifest["dimensions"] if each["is_log"])
    complete = [t for t in done if all(key in t.params for key in keys)]
    if len(complete) < 2:
        return
    if len(metrics) > 1:
        points = [p for p in _front_points(study, metrics) if all(key in p.settings for key in keys)]
        data = SpaceData("", points, [*keys, *metrics], log_keys, True)
        yield plot("parallel", draw_parallel, data, "Parallel coordinates of the trials",
                   "One line a finished trial; those of the front stand out.")  # fmt: skip
        return
    data = SpaceData(metrics[0], _points(complete), keys, log_keys, _is_lower_better(study))
    yield plot("parallel", draw_parallel, data, "Parallel coordinates of the trials",
               "One line a finished trial; the better, the stronger. The best stands out.")  # fmt: skip
    if len(keys) > 1:
        lines = "; lines join equal figures of the trials around" if has_surface(data) else ""
        yield plot("contour", draw_contour, data, f"{keys[0]} against {keys[1]}",
                   f"The two settings that mattered most; larger and stronger is better{lines}.")  # fmt: skip


def _importances(
    study: "Study", metrics: Sequence[str], keys: Sequence[str]
) -> Iterator[tuple[Block, dict[str, float]]]:
    """For each objective its plot and its shares, or why there is none."""
    common = [key for key in keys if all(key in trial.params for trial in finished(study))]
    if importlib.util.find_spec("sklearn") is None:
        words = "What mattered is not told: it needs scikit-learn. Install it with: pip install 'kajiya[metrics]'"
        yield Notice(words, "warn"), {}
        return
    if not common:
        yield Notice("What mattered is not told: no setting that varies is in every finished trial."), {}
        return
    for number, metric in enumerate(metrics):
        try:
            shares = _importance(study, common, number)
        except (RuntimeError, ValueError) as problem:  # trials that all came out the same have no variance to share out
            yield Notice(f"What mattered for {metric} is not told: {problem}"), {}
            continue
        bars = [Bar(key, share, f"{share:.0%}", 0) for key, share in shares.items()]
        said = ", ".join(f"{bar.label} {bar.text}" for bar in bars)
        caption = f"Share of the variance of {metric} that each setting explains among the finished trials (fANOVA)."
        name = "importance" if len(metrics) == 1 else f"importance-{number + 1}"
        yield plot(name, draw_bars, BarsData("share of the variance", bars), f"Importance: {said}", caption), shares


def _importance(study: "Study", keys: Sequence[str], objective: int) -> dict[str, float]:
    """fANOVA (Hutter et al., 2014), the largest share first."""
    import optuna

    def figure(trial: "FrozenTrial") -> float:
        assert trial.values is not None
        return float(trial.values[objective])

    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(keys), target=figure))


def _points(trials: "Sequence[FrozenTrial]") -> list[Point]:
    return [Point(t.number, float(t.value or 0.0), dict(t.params)) for t in trials]


def _front_points(study: "Study", metrics: Sequence[str]) -> list[Point]:
    """Finished trials with their settings and objectives; those that no other beats in all have the value 0."""
    front = {trial.number for trial in study.best_trials}
    return [
        Point(t.number, 0.0 if t.number in front else 1.0, t.params | dict(zip(metrics, t.values or [], strict=True)))
        for t in finished(study)
    ]


def _is_lower_better(study: "Study") -> bool:
    return study.direction.name != "MAXIMIZE"
