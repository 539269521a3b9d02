"""The report's figures: what each one shows, and its drawing on a figure without any global state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kajiya.flows.figure_files import Palette, draw_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_SERIES = 6


@dataclass(frozen=True)
class RunCurves:
    """One run's curves; x is tokens or steps, as the axis says."""

    label: str
    train: Sequence[tuple[float, float]]
    heldout: Sequence[tuple[float, float]]
    lr: Sequence[tuple[float, float]]
    lr_planned: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class CurvesData:
    """The training of one run or several on common axes."""

    x_label: str
    runs: Sequence[RunCurves]


@dataclass(frozen=True)
class Bar:
    """One figure with its words; `interval` for what has one; `series` is the run's number, `None` for a baseline."""

    label: str
    value: float
    text: str
    series: int | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class BarsData:
    """Figures of one kind, side by side."""

    x_label: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class SpreadData:
    """Bits per byte of each held-out document, by run, and lines to see them by."""

    values: Mapping[str, Sequence[float]]
    lines: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class MetricsData:
    """Further metrics along the training, each by run."""

    x_label: str
    metrics: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    series: Mapping[str, int]
    """Number of each run, which has a colour of its own."""


# ---------------------------------------------------------------- the figures


def draw_metrics(figure: "Figure", data: MetricsData, palette: Palette, is_narrow: bool) -> None:
    """A small chart for each metric, all over the same axis."""
    n_columns = 1 if is_narrow else min(2, len(data.metrics))
    n_rows = -(-len(data.metrics) // n_columns)
    figure.set_size_inches(figure.get_figwidth(), (30 + 165 * n_rows) / 72)
    grid = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(data.metrics) :]:
        axes.remove()
    for axes, (name, runs) in zip(grid.flat, data.metrics.items(), strict=False):
        for label, points in runs.items():
            colour = palette[f"series{data.series[label] % _N_SERIES}"]
            axes.plot(*_xy(points), color=colour, linewidth=2, label=label)
            said = [f"{label}: {name} {y:.4g} after {x:,.0f} {data.x_label}" for x, y in points]
            draw_points(axes, points, said, color=colour, markersize=4.5)
        axes.set_title(name, fontsize=11.5, loc="left", color=palette["ink"])
        axes.locator_params(axis="y", nbins=4)
        _thousands(axes, is_narrow)
    if len(data.series) > 1:
        grid.flat[0].legend(loc="best")
    figure.supxlabel(data.x_label, fontsize=12, color=palette["muted"])


def draw_bars(figure: "Figure", data: BarsData, palette: Palette, is_narrow: bool) -> None:
    """Horizontal bars, the runs' in colour, the baselines' in grey, each with its value at the end."""
    figure.set_size_inches(figure.get_figwidth(), (44 + len(data.bars) * (50 if is_narrow else 38)) / 72)
    axes = figure.subplots()
    largest = max(bar.interval[1] if bar.interval else bar.value for bar in data.bars)
    for row, bar in enumerate(data.bars):
        colour = palette["neutral"] if bar.series is None else palette[f"series{bar.series % _N_SERIES}"]
        axes.barh(row, bar.value, height=0.42 if is_narrow else 0.62, color=colour)
        end = bar.value
        if bar.interval is not None:
            low, high = bar.interval
            axes.plot([low, high], [row, row], color=palette["ink"], linewidth=1.6, solid_capstyle="butt")
            axes.plot([low, high], [row, row], "|", color=palette["ink"], markersize=9, markeredgewidth=1.6)
            end = max(end, high)
        axes.annotate(bar.text, (end, row), xytext=(7, 0), textcoords="offset points", va="center", fontweight="bold")
        if is_narrow:
            axes.annotate(
                bar.label, (0, row), xytext=(0, 14), textcoords="offset points", va="bottom", color=palette["muted"]
            )
    axes.set_yticks(range(len(data.bars)), ["" if is_narrow else bar.label for bar in data.bars])
    axes.set_ylim(len(data.bars) - 0.5, -0.78 if is_narrow else -0.5)
    axes.set_xlim(0, largest * (1.32 if is_narrow else 1.14) or 1.0)
    axes.tick_params(axis="y", labelcolor=palette["ink"], labelsize=12.5)
    axes.grid(False)
    axes.grid(True, axis="x")
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(data.x_label, loc="left")


def draw_curves(figure: "Figure", data: CurvesData, palette: Palette, is_narrow: bool) -> None:
    """Loss on the training rows and on the held-out rows; the learning rate beneath, on the same axis."""
    figure.set_size_inches(figure.get_figwidth(), (420 if is_narrow else 440) / 72)
    has_lr = any(run.lr or run.lr_planned for run in data.runs)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1]) if has_lr else (figure.subplots(), None)
    for number, run in enumerate(data.runs):
        # One run shows its two losses in two colours; several are told apart by colour, the losses by their lines.
        own = palette[f"series{number % _N_SERIES}"]
        train, heldout = (palette["series0"], palette["series1"]) if len(data.runs) == 1 else (own, own)
        prefix = "" if len(data.runs) == 1 else f"{run.label}: "
        if run.train:
            alpha = 1.0 if len(data.runs) == 1 else 0.45
            marker = "." if len(run.train) < 3 else ""
            upper.plot(
                *_xy(run.train), color=train, alpha=alpha, linewidth=1.8, marker=marker, label=f"{prefix}training"
            )
        if run.heldout:
            upper.plot(
                *_xy(run.heldout), color=heldout, linewidth=2.2, marker="o", markersize=4.5, label=f"{prefix}held out"
            )
            said = [f"{prefix}held out {y:.4f} after {x:,.0f} {data.x_label}" for x, y in run.heldout]
            draw_points(upper, run.heldout, said, color=heldout, markersize=6)
        if lower is not None:
            lower.plot(*_xy(run.lr_planned), color=palette["neutral"], linewidth=1.4, linestyle=(0, (3, 2)))
            lower.plot(*_xy(run.lr), color=own, linewidth=2, marker="." if len(run.lr) < 3 else "")
    upper.set_ylabel("loss, nats per token")
    handles, labels = upper.get_legend_handles_labels()
    if handles:
        upper.legend(handles, labels, loc="upper right", ncols=1 if is_narrow or len(handles) < 3 else 2)
    _thousands(upper if lower is None else lower, is_narrow)
    if lower is not None:
        lower.set_ylabel("learning rate")
        lower.set_ylim(bottom=0)
        lower.locator_params(axis="y", nbins=3)
        upper.tick_params(axis="x", length=0)
        figure.align_ylabels()
        layout: Any = figure.get_layout_engine()
        layout.set(hspace=0.06)
    (upper if lower is None else lower).set_xlabel(data.x_label)


def draw_spread(figure: "Figure", data: SpreadData, palette: Palette, is_narrow: bool) -> None:
    """How the held-out documents spread: a histogram for each run with a mark for every document."""
    import pandas
    import seaborn

    figure.set_size_inches(figure.get_figwidth(), (280 if is_narrow else 300) / 72)
    axes = figure.subplots()
    rows = [(label, value) for label, values in data.values.items() for value in values]
    table = pandas.DataFrame(rows, columns=["run", "bits"])
    colours = {label: palette[f"series{number % _N_SERIES}"] for number, label in enumerate(data.values)}
    seaborn.histplot(
        table, x="bits", hue="run", palette=colours, ax=axes, element="step", alpha=0.28, linewidth=1.8,
        legend=len(colours) > 1,
    )  # fmt: skip
    if len(rows) <= _MOST_MARKS:
        seaborn.rugplot(table, x="bits", hue="run", palette=colours, ax=axes, height=0.045, legend=False)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * (1.12 + 0.1 * len(data.lines)))
    # The line furthest to the right has the lowest label: none then crosses another's line.
    for row, (label, value) in enumerate(sorted(data.lines, key=lambda line: -line[1])):
        height = top * (1.1 + 0.1 * row)
        axes.vlines(value, 0, height, color=palette["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            label,
            (value, top * (1.04 + 0.1 * row)),
            xytext=(6, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=11.5,
            color=palette["ink"],
        )
    axes.set_xlabel("bits per byte of a held-out document")
    axes.set_ylabel("documents")
    locator: Any = axes.yaxis.get_major_locator()
    locator.set_params(integer=True)
    legend: Any = axes.get_legend()
    if legend is not None:
        legend.set_title(None)


_MOST_MARKS = 400
"""More marks than this would only blacken the axis (and swell the file)."""


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _thousands(axes: "Axes", is_narrow: bool) -> None:
    """Tokens as people write them: 500k, 2M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def write(value: float, _position: int | None = None) -> str:
        for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if value >= factor:
                return f"{value / factor:g}{letter}"
        return f"{value:g}"

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if is_narrow else 8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(write))
