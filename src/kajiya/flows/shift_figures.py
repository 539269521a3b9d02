"""Figures of a shift: two histograms on one axis, two clouds of embeddings in one plane."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kajiya.flows.figure_files import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_BINS = 30


@dataclass(frozen=True)
class OverlayData:
    """Values of one quantity, by side."""

    x_label: str
    sides: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MapData:
    """Points [n, 2], by side."""

    kind: str
    sides: Mapping[str, np.ndarray]


def draw_overlay(figure: "Figure", data: OverlayData, palette: Palette, is_narrow: bool) -> None:
    """Shares of the rows in common bins; a long tail past the 99th percentile stands in the last one."""
    figure.set_size_inches(figure.get_figwidth(), (230 if is_narrow else 240) / 72)
    axes = figure.subplots()
    together = np.concatenate(list(data.sides.values()))
    low, high = float(together.min()), float(np.quantile(together, 0.99))
    high = high if high > low else float(together.max())
    n_bins = max(6, min(_MOST_BINS, round(2 * len(together) ** 0.5)))
    edges = np.linspace(low, high, n_bins + 1)
    for number, (label, values) in enumerate(data.sides.items()):
        heights = np.histogram(np.clip(values, low, high), bins=edges)[0] / len(values)
        axes.stairs(heights, edges, color=palette[f"series{number}"], linewidth=1.9, label=f"{label} ({len(values):,})")
        axes.stairs(heights, edges, color=palette[f"series{number}"], fill=True, alpha=0.16)
    axes.set_xlabel(data.x_label)
    axes.set_ylabel("share of the rows")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def draw_map(figure: "Figure", data: MapData, palette: Palette, is_narrow: bool) -> None:
    """Both clouds; a cross is the middle of one."""
    figure.set_size_inches(figure.get_figwidth(), (340 if is_narrow else 420) / 72)
    axes = figure.subplots()
    for number, (label, places) in enumerate(data.sides.items()):
        colour = palette[f"series{number}"]
        axes.plot(
            places[:, 0], places[:, 1], "o", color=colour, alpha=0.45, markersize=4, label=f"{label} ({len(places):,})"
        )
        axes.plot(*places.mean(axis=0), "X", color=colour, markersize=11, markeredgecolor=palette["ink"])
    axes.set_xlabel(f"{data.kind} 1")
    axes.set_ylabel(f"{data.kind} 2")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
