"""Figures of a study: its course, what mattered, parallel coordinates, pairs of settings, the rungs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kajiya.flows.figure_files import Palette, draw_points, tip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 12
"""Distinct values of a setting that an axis names one by one."""
_FEWEST_FOR_SURFACE = 10
_FEWEST_PLACES = 5
"""Trials, and different values of a setting among them, from which on a surface between them is drawn."""
_GRID = 80
_WIDTH = 0.12
"""Standard deviation of the weights around a place, of the axis's length."""


@dataclass(frozen=True)
class Point:
    """One trial with a figure."""

    number: int
    value: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class HistoryData:
    """Figures in the order of the trials."""

    metric: str
    points: Sequence[Point]
    is_lower_better: bool
    ended_early: Sequence[int]
    """Numbers of trials without a figure."""


@dataclass(frozen=True)
class SpaceData:
    """Trials in the space of their settings."""

    metric: str
    """Empty with several objectives: `settings` have them, and a point on the front has the value 0."""
    points: Sequence[Point]
    keys: Sequence[str]
    log_keys: frozenset[str]
    is_lower_better: bool


@dataclass(frozen=True)
class RungsData:
    """The course of each trial over its evaluations."""

    metric: str
    courses: Sequence[tuple[int, Sequence[tuple[int, float]], bool]]
    """Number, (evaluation, value) and whether it came to its end."""
    rungs: Sequence[int]


def draw_history(figure: "Figure", data: HistoryData, palette: Palette, is_narrow: bool) -> None:
    """Every trial's figure, and the best until then."""
    figure.set_size_inches(figure.get_figwidth(), (300 if is_narrow else 320) / 72)
    axes = figure.subplots()
    numbers, values = [p.number for p in data.points], [p.value for p in data.points]
    best = np.minimum.accumulate(values) if data.is_lower_better else np.maximum.accumulate(values)
    axes.plot([], [], "o", color=palette["series0"], markersize=5.5, label="a trial")
    draw_points(axes, list(zip(numbers, values, strict=True)), [_told(p, data.metric) for p in data.points],
                color=palette["series0"], markersize=5.5)  # fmt: skip
    axes.step(numbers, best, where="post", color=palette["series1"], linewidth=2.2, label="the best so far")
    if data.ended_early:
        low = axes.get_ylim()[0]
        axes.plot(data.ended_early, [low] * len(data.ended_early), "|", color=palette["neutral"], markersize=11,
                  markeredgewidth=2, label="pruned or failed", clip_on=False)  # fmt: skip
    _whole_numbers(axes)
    axes.set_xlabel("trial")
    axes.set_ylabel(data.metric)
    axes.legend(loc="best")


def draw_parallel(figure: "Figure", data: SpaceData, palette: Palette, is_narrow: bool) -> None:
    """One line a trial through all of its settings; the better, the stronger; the best, or the front, in a colour of its own."""
    figure.set_size_inches(figure.get_figwidth(), (360 if is_narrow else 380) / 72)
    axes = figure.subplots()
    columns = [_axis([p.settings.get(key) for p in data.points], key in data.log_keys) for key in data.keys]
    names = list(data.keys)
    ranks = _ranks(data)
    is_best, shares = ranks == 0, 1 - ranks / max(1, len(ranks) - 1)
    if data.metric:
        columns.append(_axis([p.value for p in data.points], False))
        names.append(data.metric)
    else:
        is_best = np.array([p.value == 0 for p in data.points])
        shares = np.where(is_best, 1.0, 0.4)
    for row in np.argsort(shares):
        colour, share = palette["series1" if is_best[row] else "series0"], float(shares[row])
        (line,) = axes.plot(range(len(columns)), [places[row] for places, _ in columns], color=colour,
                  alpha=0.15 + 0.85 * share**2, linewidth=2.6 if is_best[row] else 1.4, zorder=2 + share)  # fmt: skip
        tip(line, _told(data.points[row], data.metric))
    for x, (_, ticks) in enumerate(columns):
        axes.axvline(x, color=palette["faint"], linewidth=1.4, zorder=1)
        for place, text in ticks:
            axes.annotate(text, (x, place), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8.5 if is_narrow else 10, color=palette["ink"], zorder=9)  # fmt: skip
    words = [name.rpartition(".")[2] if is_narrow else name for name in names]
    axes.set_xticks(range(len(columns)), words, fontsize=8.5 if is_narrow else 11)
    axes.set_xlim(-0.15, len(columns) - 1 + (0.75 if is_narrow else 0.4))
    axes.set_yticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def draw_contour(figure: "Figure", data: SpaceData, palette: Palette, is_narrow: bool) -> None:
    """The two settings that mattered most against each other; the surface between the trials is interpolated."""
    figure.set_size_inches(figure.get_figwidth(), (340 if is_narrow else 380) / 72)
    axes = figure.subplots()
    keys = list(data.keys[:2])
    (x, x_ticks), (y, y_ticks) = (
        _axis([p.settings.get(key) for p in data.points], key in data.log_keys) for key in keys
    )
    values = np.array([p.value for p in data.points])
    ranks = _ranks(data)
    shades = 1 - ranks / max(1, len(ranks) - 1)
    # A figure whose colours are roles cannot hold a colour map: depth is opacity of one colour.
    if has_surface(data):
        grid, mean = _surface(x, y, values)
        levels = np.unique(np.nanquantile(mean, (0.1, 0.3, 0.5, 0.7, 0.9)))
        axes.contour(grid, grid, mean, levels, colors=[palette["neutral"]], linewidths=1.1, zorder=1)
    for row in range(len(values)):
        draw_points(axes, [(x[row], y[row])], [_told(data.points[row], data.metric)],
                    color=palette["series1" if ranks[row] == 0 else "series0"],
                    alpha=0.2 + 0.8 * float(shades[row]) ** 2, markersize=7 + 6 * float(shades[row]))  # fmt: skip
    axes.set_xticks([place for place, _ in x_ticks], [text for _, text in x_ticks])
    axes.set_yticks([place for place, _ in y_ticks], [text for _, text in y_ticks])
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])


def draw_rungs(figure: "Figure", data: RungsData, palette: Palette, is_narrow: bool) -> None:
    """The course of every trial by evaluations; pruned ones end in a cross."""
    figure.set_size_inches(figure.get_figwidth(), (320 if is_narrow else 340) / 72)
    axes = figure.subplots()
    for _, points, is_whole in data.courses:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        colour = palette["series0"] if is_whole else palette["neutral"]
        axes.plot(xs, ys, color=colour, linewidth=1.8 if is_whole else 1.2, marker="." if len(xs) == 1 else "")
        if not is_whole:
            axes.plot(xs[-1], ys[-1], "x", color=palette["series1"], markersize=6, markeredgewidth=1.8)
    for rung in data.rungs:
        axes.axvline(rung, color=palette["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    _whole_numbers(axes)
    axes.set_xlabel("evaluation" + (" (dotted: rungs)" if data.rungs else ""))
    axes.set_ylabel(data.metric)


def draw_front(figure: "Figure", data: SpaceData, palette: Palette, is_narrow: bool) -> None:
    """The objectives `keys[0]` and `keys[1]` against each other."""
    figure.set_size_inches(figure.get_figwidth(), (320 if is_narrow else 360) / 72)
    axes = figure.subplots()
    for is_front, colour in ((False, "neutral"), (True, "series1")):
        chosen = [p for p in data.points if (p.value == 0) == is_front]
        label = "no other is better in all" if is_front else "other trials"
        axes.plot([], [], "o", color=palette[colour], markersize=6.5, label=label)
        places = [(p.settings[data.keys[0]], p.settings[data.keys[1]]) for p in chosen]
        draw_points(axes, places, [_told(p, "") for p in chosen], color=palette[colour], markersize=6.5)
    axes.set_xlabel(data.keys[0])
    axes.set_ylabel(data.keys[1])
    axes.legend(loc="best")


def _told(point: Point, metric: str) -> str:
    """A trial in a line, for its tip."""
    settings = ", ".join(f"{key} {short(value)}" for key, value in point.settings.items())
    return f"trial {point.number}: " + (f"{metric} {point.value:.5g}; " if metric else "") + settings


def short(value: Any) -> str:
    """A setting in few letters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranks(data: SpaceData) -> np.ndarray:
    """0 for the best trial, 1 for the next …"""
    values = np.array([p.value for p in data.points])
    order = np.argsort(values if data.is_lower_better else -values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    return ranks


def _axis(values: Sequence[Any], is_log: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Places between 0 and 1, and ticks; numbers by size, anything else by name."""
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if is_number and len(set(values)) > 1:
        numbers = np.array(values, dtype=np.float64)
        scaled = np.log(numbers) if is_log else numbers
        low, high = scaled.min(), scaled.max()
        places = (scaled - low) / (high - low)
        distinct = sorted(set(numbers.tolist()))
        if len(distinct) <= 5:
            marks = distinct
        else:
            marks = _round_marks(low, high, is_log)
        ticks = [((np.log(mark) if is_log else mark) - low) / (high - low) for mark in marks]
        return places, [(float(tick), f"{mark:.3g}") for tick, mark in zip(ticks, marks, strict=True)]
    names = list(dict.fromkeys(str(v) for v in values))[:_MOST_NAMES]
    at = {name: (0.5 if len(names) == 1 else i / (len(names) - 1)) for i, name in enumerate(names)}
    return np.array([at.get(str(v), 0.5) for v in values]), [(place, name) for name, place in at.items()]


def _round_marks(low: float, high: float, is_log: bool) -> list[float]:
    """A few round numbers between the two; those of a logarithmic axis are given and found as powers."""
    from matplotlib.ticker import MaxNLocator

    if is_log:
        tens = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            marks = [digit * 10.0**ten for ten in tens for digit in digits]
            marks = [mark for mark in marks if low <= math.log(mark) <= high]
            if len(marks) >= 3:
                return marks[:: math.ceil(len(marks) / 5)]
        low, high = math.exp(low), math.exp(high)
    return [float(mark) for mark in MaxNLocator(4).tick_values(low, high) if low <= mark <= high]


def has_surface(data: SpaceData) -> bool:
    """Whether the trials are enough, in both of the first two settings, to say what lies between them."""
    several = all(len({p.settings.get(key) for p in data.points}) >= _FEWEST_PLACES for key in data.keys[:2])
    numbers = all(isinstance(p.settings.get(key), (int, float)) for p in data.points for key in data.keys[:2])
    return len(data.points) >= _FEWEST_FOR_SURFACE and several and numbers


def _surface(x: np.ndarray, y: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the trials around each place of a grid of the unit square, nearer ones weighing more; NaN far from all."""
    grid = np.linspace(0, 1, _GRID)
    square = (x[:, None, None] - grid) ** 2 + (y[:, None, None] - grid[:, None]) ** 2
    weights = np.exp(-square / (2 * _WIDTH**2))
    mean = np.tensordot(values, weights, 1) / weights.sum(0)
    return grid, np.where(square.min(0) <= (2 * _WIDTH) ** 2, mean, np.nan)


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
