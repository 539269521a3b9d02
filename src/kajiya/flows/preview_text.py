"""A preview in a terminal, in colour, and as plain text without control codes: both say the same."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from kajiya.data.ledger import ledger_table, ledger_words
from kajiya.flows.preview_rows import Piece, Preview, Shown, Strand
from kajiya.flows.report_page import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_STYLES = {"target": "bold green", "context": "default", "special": "reverse cyan", "special target": "reverse green"}
_SIDE_BY_SIDE = 100
"""Columns from which on two sequences stand side by side."""


def preview_text(preview: Preview, with_ids: bool) -> str:
    """The preview for a pipe or a file: «trained», ⟦special⟧, a weight that is not 1 as «…»×0.5."""
    return "\n".join(_lines(preview, with_ids)) + "\n"


def print_preview(console: "Console", preview: Preview, with_ids: bool) -> None:
    """The preview for a terminal: trained tokens green and bold, special tokens on a coloured ground."""
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console.print(Text("\n".join(preview.words)))
    legend = Text("Legend: ").append("trained", _STYLES["target"]).append("  context  ")
    legend.append("special token", _STYLES["special"]).append("  ").append("trained special", _STYLES["special target"])
    console.print(legend)
    for row in preview.rows:
        console.print(Rule(row_words(row), style="dim", align="left"))
        for group in row.groups:
            strands: list[RenderableType] = [
                Panel(
                    _coloured(strand, with_ids),
                    title=Text(strand_words(strand)),
                    title_align="left",
                    border_style="dim",
                )
                for strand in group
            ]
            if len(strands) == 2 and console.width >= _SIDE_BY_SIDE:
                pair = Table.grid(expand=True)
                for _ in strands:
                    pair.add_column(ratio=1)
                pair.add_row(*strands)
                console.print(pair)
            else:
                for panel in strands:
                    console.print(panel)
    console.print(Rule("Ledger", style="dim", align="left"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in _HEAD:
        table.add_column(title, justify="right" if title else "left")
    for cells in ledger_table(preview.ledger):
        table.add_row(*cells)
    console.print(table)
    for text in ledger_notes(preview):
        console.print(text, highlight=False, markup=False)


# ---------------------------------------------------------------- words that all forms share


def row_words(row: Shown) -> str:
    """What a row holds, in numbers."""
    n = len(row.strands)
    share = f" ({row.n_targets / row.n_tokens:.0%})" if row.n_tokens else ""
    filled = f", {row.n_filled:,} that fill up" if row.n_filled else ""
    sequences = f"{n:,} sequence" + ("s" if n != 1 else "")
    return f"row {row.number:,}: {sequences}, {row.n_tokens:,} tokens, {row.n_targets:,} trained{share}{filled}"


def strand_words(strand: Strand) -> str:
    """A sequence's name and numbers."""
    name = f"{visible(strand.title)} · " if strand.title else ""
    return f"{name}{len(strand.pieces):,} tokens, {strand.n_targets:,} trained"


def ledger_notes(preview: Preview) -> list[str]:
    """What the ledger says beside its table."""
    ledger = preview.ledger
    lost = [f"{n:,} of {whole:,} {unit}" for unit, (n, whole) in ledger.lost.items() if n]
    said = [ledger_words(ledger), f"Lost: {', '.join(lost) or 'nothing'}."]
    return [*said, *(f"It does not add up: {problem}." for problem in ledger.problems)]


def piece_text(piece: Piece) -> str:
    """A token's text so that it can be seen: line ends marked, control characters as pictures."""
    shown = visible(piece.text.replace("\r", "␍")).replace("\n", "↵\n").replace("\t", "⇥\t")
    return f"{shown}→{visible(piece.hidden)}" if piece.hidden is not None else shown


def number_words(weight: float) -> str:
    """A weight that is not 1, as it stands behind what it weighs."""
    return "" if weight in (0.0, 1.0) else f"×{weight:g}"


# ---------------------------------------------------------------- plain


def _lines(preview: Preview, with_ids: bool) -> Iterator[str]:
    yield from preview.words
    yield "Legend: «trained», context, ⟦special token⟧" + (", ‹id›" if with_ids else "")
    for row in preview.rows:
        yield ""
        yield f"===== {row_words(row)}"
        for group in row.groups:
            for strand in group:
                yield f"----- {strand_words(strand)}"
                yield plain_strand(strand, with_ids)
    yield ""
    yield "===== Ledger"
    table = ledger_table(preview.ledger)
    widths = [max(len(cells[column]) for cells in (*table, _HEAD)) for column in range(len(_HEAD))]
    for cells in (_HEAD, *table):
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        yield "  ".join([cells[0].ljust(widths[0]), *numbers])
    yield from ledger_notes(preview)


_HEAD = ["", "rows", "bytes", "tokens"]


def plain_strand(strand: Strand, with_ids: bool) -> str:
    """A sequence in one text, runs of trained tokens between « and »."""
    parts = []
    for weight, run in groupby(strand.pieces, key=lambda piece: piece.weight):
        text = "".join(_plain_piece(piece, with_ids) for piece in run)
        parts.append(f"«{text}»{number_words(weight)}" if weight > 0 else text)
    return "".join(parts)


def _plain_piece(piece: Piece, with_ids: bool) -> str:
    text = f"⟦{piece_text(piece)}⟧" if piece.is_special else piece_text(piece)
    return f"{text}‹{piece.id}›" if with_ids else text


# ---------------------------------------------------------------- coloured


def _coloured(strand: Strand, with_ids: bool) -> "Text":
    from rich.text import Text

    text = Text(tab_size=4)
    for weight, run in groupby(strand.pieces, key=lambda piece: piece.weight):
        for piece in run:
            text.append(piece_text(piece), _STYLES[_kind(piece)])
            if with_ids:
                text.append(f"‹{piece.id}›", "dim")
        if number_words(weight):
            text.append(number_words(weight), "yellow")
    return text


def _kind(piece: Piece) -> str:
    if piece.is_special:
        return "special target" if piece.weight > 0 else "special"
    return "target" if piece.weight > 0 else "context"
