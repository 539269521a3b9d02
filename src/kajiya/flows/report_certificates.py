"""The certificates of merges: what was measured beside the parent, its tolerance, and what the parent's rounding added to it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kajiya.flows.report_facts import MERGED, RunFacts
from kajiya.flows.report_page import Block, Column, Heading, Notice, Section, Table
from kajiya.flows.report_results import run_title

_MEASURES = (
    ("max_difference", "largest difference of a logit", "{:.2g}"),
    ("kl", "KL, nats per token", "{:.2g}"),
    ("top1", "top-1", "{:.2%}"),
    ("greedy", "greedy continuation", "{:.2%}"),
    ("perplexity", "change of the perplexity", "{:.2%}"),
)
_SHARES = ("top1", "greedy")
"""Measures that are to be no less than their tolerance; the others are to be no more."""


def certificates_section(runs: Sequence[RunFacts]) -> Section | None:
    """What the merges of each run's adapter were held to; `None` where there was none."""
    blocks: list[Block] = []
    for run in runs:
        for name, part in run.parts.items():
            if not name.startswith(MERGED):
                continue
            blocks.append(Heading(f"{run_title(run, runs)}: merged into {part.facts['dtype']}"))
            blocks.extend(parity_blocks(part.facts["parity"]))
    return Section("certificates", "Certificates of merges", blocks) if blocks else None


def parity_blocks(parity: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """A table of what was measured in each dtype; in red, what is within what was allowed and past the tolerance itself."""
    columns = [Column("computed in"), Column("measure")]
    columns += [Column(name, "number") for name in ("found", "tolerance", "rounding alone", "allowed")]
    rows, loosened = [], []
    for row in parity:
        for key, words, form in _MEASURES:
            limit, allowed = row["tolerance"][key], row["allowed"][key]
            found, own = _value(row, row, key), _value(row, row["rounding"], key)
            if limit is None or found is None:
                continue
            rows.append([row["dtype"], words, *(_shown(form, each) for each in (found, limit, own, allowed))])
            if found < limit if key in _SHARES else found > limit:
                loosened.append(f"{row['dtype']}: {words} {_shown(form, found)}, tolerance {_shown(form, limit)}")
    yield Table(columns, rows)
    if loosened:
        yield Notice(
            f"Past the tolerance, and allowed for what rounding alone does to the adapter beside its base: {'; '.join(loosened)}.",
            "bad",
        )


def _value(row: Mapping[str, Any], of: Mapping[str, Any] | None, key: str) -> float | None:
    """The measure of the result or of the rounded parent; a perplexity as its change."""
    value: float | None = None if of is None else of[key]
    if key != "perplexity" or value is None:
        return value
    return abs(value / float(row["parent_perplexity"]) - 1)


def _shown(form: str, value: float | None) -> str:
    return "—" if value is None else form.format(value)
