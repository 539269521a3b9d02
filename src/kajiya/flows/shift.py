"""`kajiya shift A B`: how far two data sets, or two models' outputs, lie apart, quantity by quantity, with maps of embeddings."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.data.progress import OnEvent, silent
from kajiya.errors import ConfigError
from kajiya.evals.answers import LocalModel
from kajiya.evals.shift import Shift, embedding_shift, map_embeddings, measure_shift
from kajiya.flows.figure_files import require_figures
from kajiya.flows.report import write_page
from kajiya.flows.report_page import Block, Column, Notice, Page, Section, Table, Text, Tiles
from kajiya.flows.report_results import plot
from kajiya.flows.report_settings import moment
from kajiya.flows.shift_figures import MapData, OverlayData, draw_map, draw_overlay
from kajiya.flows.shift_samples import Sample, read_sample
from kajiya.flows.targets import find_model
from kajiya.run.store import Store

_MOST_FIGURES = 6
_FEWEST_ROWS = 5


@dataclass(frozen=True)
class ShiftAsked:
    """What is compared, and how."""

    first: str
    second: str
    keys: tuple[str, ...] = ()
    """Columns whose texts count; none: all of them."""
    model: str | None = None
    """Whose embeddings are mapped; `None`: none are."""
    map: str = "pca"
    """pca or umap."""
    limit: int | None = 2000
    """Most rows of each side."""


@dataclass(frozen=True)
class Compared:
    """One quantity of both sides."""

    name: str
    first: np.ndarray
    second: np.ndarray
    shift: Shift


_QUANTITIES: Mapping[str, Callable[[str], float]] = {
    "bytes": lambda text: float(len(text.encode("utf-8", "replace"))),
    "words": lambda text: float(len(text.split())),
    "lines": lambda text: float(text.count("\n") + 1),
    "letters of a word": lambda text: float(np.mean([len(word) for word in text.split()] or [0])),
    "distinct words, share": lambda text: len(set(text.split())) / max(1, len(text.split())),
    "letters beyond ASCII, share": lambda text: sum(ord(letter) > 127 for letter in text) / max(1, len(text)),
    "digits, share": lambda text: sum(letter.isdigit() for letter in text) / max(1, len(text)),
}


def compare_samples(asked: ShiftAsked, store: Store, folder: Path, on_event: OnEvent = silent) -> dict[str, Any]:
    """Measure, write `report.html` and `report.md` into `folder`, and return the facts (JSON).

    Raises `ConfigError` for a side that is nothing known, `DataError` for one with nothing in it.
    """
    require_figures()
    if asked.map not in ("pca", "umap"):
        raise ConfigError("--map", f"{asked.map!r} is not one of pca, umap")
    first, second = (read_sample(what, store, asked.keys, asked.limit) for what in (asked.first, asked.second))
    compared = _compare(first, second)
    if not compared:
        raise ConfigError(
            f"{asked.first} and {asked.second}", f"have nothing in common with {_FEWEST_ROWS} rows on each side"
        )
    blocks: list[Block] = []
    directions: list[Shift] = []
    if asked.model is not None:
        model = LocalModel(find_model(asked.model, store).model.path, 16)
        on_event("stage", name="embeddings", state="begun", seconds=0.0, text="")
        began = time.perf_counter()
        vectors = [model.embed(side.texts) for side in (first, second)]
        on_event("stage", name="embeddings", state="done", seconds=time.perf_counter() - began, text=asked.model)
        directions = embedding_shift(vectors[0], vectors[1])
        blocks = _map_blocks(asked, (first, second), vectors, directions)
    path = write_page(_page(asked, (first, second), compared, blocks), folder)
    return {
        "first": asked.first,
        "second": asked.second,
        "rows": [len(first.texts), len(second.texts)],
        "quantities": {each.name: _facts(each.shift) for each in compared},
        "embedding_directions": [_facts(each) for each in directions],
        "report": str(path),
    }


def _facts(shift: Shift) -> dict[str, Any]:
    return {
        "wasserstein": shift.wasserstein, "ks": shift.ks, "ks_p_value": shift.ks_p_value, "psi": shift.psi,
        "verdict": shift.verdict, "words": shift.words,
    }  # fmt: skip


def _compare(first: Sample, second: Sample) -> list[Compared]:
    """Every quantity of the texts, and every number that both sides have: what the test shows first, the largest at its head."""
    found: list[Compared] = []
    sides: list[tuple[str, np.ndarray, np.ndarray]] = []
    for name, measure in _QUANTITIES.items():
        a, b = (np.array([measure(text) for text in side.texts]) for side in (first, second))
        sides.append((name, a, b))
    for name in first.numbers.keys() & second.numbers.keys():
        sides.append((f"column {name}", np.array(first.numbers[name]), np.array(second.numbers[name])))
    for name, a, b in sides:
        if min(len(a), len(b)) >= _FEWEST_ROWS and len(np.unique(np.concatenate([a, b]))) > 1:
            found.append(Compared(name, a, b, measure_shift(a, b)))
    return sorted(found, key=lambda each: (each.shift.ks_p_value >= 0.05, -each.shift.psi))


# ---------------------------------------------------------------- the page


def _page(asked: ShiftAsked, sides: Sequence[Sample], compared: Sequence[Compared], maps: list[Block]) -> Page:
    columns = [
        Column(""),
        *(Column(title, "number") for title in ("A, median", "B, median", "Wasserstein", "KS", "p", "PSI")),
    ]
    rows = [
        [
            each.name, f"{np.median(each.first):.4g}", f"{np.median(each.second):.4g}", f"{each.shift.wasserstein:.4g}",
            f"{each.shift.ks:.3f}", f"{each.shift.ks_p_value:.2g}", f"{each.shift.psi:.3f}",
        ]
        for each in compared
    ]  # fmt: skip
    shifted = frozenset(i for i, each in enumerate(compared) if each.shift.psi >= 0.25 and each.shift.ks_p_value < 0.05)
    blocks: list[Block] = [Table([*columns, Column("verdict")], [
        [*row, each.shift.verdict] for row, each in zip(rows, compared, strict=True)
    ], shifted)]  # fmt: skip
    blocks.append(
        Text(
            "Of each row one figure. Wasserstein: how far the mass must move, in the quantity's own unit; KS: largest distance of "
            "the two distribution functions, with its test; PSI over ten bins of A, customarily stable below 0.1 and shifted "
            "above 0.25. Rows in bold: PSI at least 0.25, and shown by the test.",
            is_aside=True,
        )
    )
    for each in compared[:_MOST_FIGURES]:
        data = OverlayData(each.name, {"A": each.first, "B": each.second})
        name = "shift-" + "".join(letter if letter.isalnum() else "-" for letter in each.name)
        blocks.append(plot(name, draw_overlay, data, f"Histogram of {each.name}", f"{each.name}: {each.shift.words}."))
    unreadable = [f"{side.name}: {side.n_unreadable:,} rows cannot be read" for side in sides if side.n_unreadable]
    blocks += [Notice(words, "warn") for words in unreadable]
    worst = compared[0]
    sections = [Section("quantities", "Quantities", blocks)]
    if maps:
        sections.append(Section("map", "Map of embeddings", maps))
    return Page(
        title="Distribution shift",
        status="finished",
        status_words="compared",
        subtitle=f"A: {asked.first} · B: {asked.second} · {moment(time.time())}",
        verdict=[f"The largest shift from A to B is in {worst.name}: {worst.shift.words}."],
        blocks=[Tiles([(f"{len(side.texts):,}", f"rows of {label}") for label, side in zip("AB", sides, strict=True)])],
        sections=sections,
        footer="Written by Kajiya.",
    )


def _map_blocks(
    asked: ShiftAsked, sides: Sequence[Sample], vectors: Sequence[np.ndarray], directions: Sequence[Shift]
) -> list[Block]:
    places = map_embeddings(np.concatenate(list(vectors)), asked.map)
    n = len(vectors[0])
    titles = {"pca": "the two directions along which they vary most", "umap": "UMAP, which keeps neighbours together"}
    data = MapData(asked.map.upper(), {"A": places[:n], "B": places[n:]})
    caption = f"Embeddings of the rows by {asked.model}, in a plane: {titles[asked.map]}. Each point is a row."
    columns = [
        Column("direction of A", "number"),
        *(Column(title, "number") for title in ("Wasserstein", "KS", "p", "PSI")),
    ]
    rows = [
        [str(i + 1), f"{each.wasserstein:.4g}", f"{each.ks:.3f}", f"{each.ks_p_value:.2g}", f"{each.psi:.3f}"]
        for i, each in enumerate(directions)
    ]
    return [
        plot("map", draw_map, data, "Map of embeddings", caption),
        Table(columns, rows),
        Text("Principal directions of A's embeddings, the widest first; both sides along each of them.", is_aside=True),
    ]
