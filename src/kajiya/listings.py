"""Facts as tables for a terminal."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kajiya.config.quantities import format_bytes, format_seconds
from kajiya.run.status import RunStatus

if TYPE_CHECKING:
    from kajiya.preflight.doctor import Finding
    from kajiya.run.holdings import ArtifactRow
    from kajiya.run.inspect import RunDiff, RunFacts, RunRow

_MARKS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "missing": "[dim]–[/dim]"}


def print_table(console: Console, table: Table) -> None:
    """A table; in a pipe each row is one line, without blanks behind its last cell."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def evaluation_table(evaluation: Mapping[str, Any], baselines: Mapping[str, Any]) -> Table:
    """The model beside its baselines, in bits per byte of the same held-out bytes."""
    table = _table("", "bits per byte", "95 % interval", "perplexity")
    bounds = evaluation["bits_per_byte_interval"]
    table.add_row(
        "model",
        f"[bold]{evaluation['bits_per_byte']:.3f}[/bold]",
        "none: one document" if bounds is None else f"{bounds[0]:.3f} – {bounds[1]:.3f}",
        f"{evaluation['perplexity']:.2f}",
    )
    for name, row in baselines["baselines"].items():
        table.add_row(name, f"{row['bits_per_byte']:.3f}", "", "")
    n_more = evaluation["n_unscored_bytes"]
    more = f", {n_more:,} more without a log-probability" if n_more else ""
    table.caption = f"{evaluation['n_bytes']:,} bytes in {evaluation['n_documents']} held-out documents{more}"
    return table


def confusion_table(details: Mapping[str, Any]) -> Table:
    """How often each right class (down) was taken for which (across)."""
    table = _table("right \\ picked", *map(str, details["classes"]))
    for name, row in zip(details["classes"], details["confusion"], strict=True):
        table.add_row(escape(str(name)), *(f"{count:,}" for count in row))
    return table


def task_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line a metric of each task, with its interval."""
    table = _table("task", "metric", "figure", "95 % interval", "rows", "sources", "computed as")
    for facts in results:
        for name, figure in facts["figures"].items():
            value, interval = figure["value"], figure["interval"]
            table.add_row(
                escape(facts["task"]),
                name + (" (less is better)" if figure["is_lower_better"] else ""),
                "none" if value is None else f"[bold]{value:.4g}[/bold]",
                "" if interval is None else f"{interval[0]:.4g} – {interval[1]:.4g}",
                f"{facts['n_rows']:,}",
                f"{facts['n_groups']:,}",
                escape(figure["signature"]),
            )
    return table


def shift_table(facts: Mapping[str, Any]) -> Table:
    """One line a quantity of two data sets, the largest shift first."""
    table = _table("", "Wasserstein", "KS", "p", "PSI", "verdict")
    for name, each in facts["quantities"].items():
        figures = (f"{each['wasserstein']:.4g}", f"{each['ks']:.3f}", f"{each['ks_p_value']:.2g}", f"{each['psi']:.3f}")
        table.add_row(escape(name), *figures, each["verdict"])
    table.caption = (
        f"{facts['rows'][0]:,} rows of {escape(facts['first'])}, {facts['rows'][1]:,} of {escape(facts['second'])}"
    )
    return table


def show_misses(console: Console, task: str, rows: Sequence[Mapping[str, Any]], by: str, most: int) -> None:
    """Rows without full marks, the worst first: end of the prompt, answer, target, figure, what the metric noted."""
    console.print(f"{task}: {len(rows):,} rows without full marks, {min(most, len(rows))} of them:", highlight=False)
    for row in rows[:most]:
        total, count = row[f"{by}: statistics"]
        notes = [str(value) for key, value in row.items() if key.endswith(": note") and value]
        for words, text in (
            ("source", row["group"]),
            *(_asked(row) if "prompt" in row else [("row", row["row"])]),
            (by, f"{total / count:.4g}"),
            ("note", "; ".join(notes)),
        ):
            if text:
                console.print(f"[dim]{words}:[/dim] {escape(text)}", highlight=False, soft_wrap=True)
        console.print("─" * 40, style="dim")


def _asked(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("prompt", row["prompt"][-400:]), ("answer", row["answers"][0]), ("target", row["target"])]


def runs_table(rows: Sequence["RunRow"]) -> Table:
    """One line a run; where some belong to a search, which one."""
    in_study = any(row.study is not None for row in rows)
    titles = ("run", "status", "begun", "step", "train nll", "held-out nll", "bits per byte")
    table = _table(*titles, *(("study",) if in_study else ()))
    for row in rows:
        figures = [row.metrics.get(name) for name in ("train/nll", "eval/nll", "test/bits_per_byte")]
        step = "" if row.step is None else f"{row.step:,}"
        numbers = (_number(figure) for figure in figures)
        table.add_row(row.id, row.words, _time(row.created), step, *numbers, *((row.study or "",) if in_study else ()))
    return table


def show_run(console: Console, facts: "RunFacts") -> None:
    """All facts of a run, as short tables."""
    table = _table("", "", header=False)
    table.add_row("run", facts.id)
    status = RunStatus(facts.status, facts.since).words
    table.add_row("status", f"{status}, {facts.attempts} attempt(s), begun {_time(facts.created)}")
    table.add_row("folder", f"{escape(facts.folder)} ({format_bytes(facts.bytes)})")
    table.add_row("command", escape(" ".join(facts.command)))
    for name, value in facts.history.metrics.items():
        table.add_row(name, _number(value))
    for name, seconds in facts.timings.items():
        table.add_row(f"time: {name}", format_seconds(seconds))
    for name, value in facts.derived.items():
        table.add_row(f"derived: {name}", str(value))
    for name, entry in facts.artifacts.items():
        table.add_row(f"artifact: {name}", escape(str(entry.get("path", ""))))
    for name, state in facts.trackers.items():
        table.add_row(
            f"tracker: {name}", escape(", ".join(f"{key} {value}" for key, value in state.items() if value is not None))
        )
    for text in facts.history.warnings:
        table.add_row("[yellow]warning[/yellow]", escape(text))
    print_table(console, table)


def diff_table(found: "RunDiff") -> Table:
    """Each difference of two runs on a line, by kind."""
    table = _table("", found.first, found.second)
    for kind in ("config", "artifacts", "code", "environment"):
        for name, (first, second) in getattr(found, kind).items():
            table.add_row(f"{kind}: {name}", escape(str(first)), escape(str(second)))
    for name, row in found.metrics.items():
        table.add_row(f"metric: {name}", _number(row["first"]), _number(row["second"]))
    return table


def show_findings(console: Console, findings: Sequence["Finding"]) -> None:
    """What the doctor found, and below what is missing the command that mends it, whole, on a line of its own."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        words = f"{_MARKS[finding.state]} {finding.name:{width}}  {escape(finding.value)}"
        console.print(words, highlight=False, soft_wrap=True)
        if finding.remedy:
            console.print(" " * (width + 4) + finding.remedy, highlight=False, soft_wrap=True, markup=False)


def store_table(rows: Sequence["ArtifactRow"]) -> Table:
    """One line an artifact."""
    table = _table("artifact", "made", "size", "runs", "pin")
    for row in rows:
        table.add_row(row.name, _time(row.created), format_bytes(row.bytes), ", ".join(row.runs), row.pin or "")
    return table


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=header, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def merge_lines(facts: Mapping[str, Any]) -> list[str]:
    """What a certificate of a merge says."""
    if "parity" not in facts:
        parents = ", ".join(f"{each:.2f}" for each in facts["parent_perplexities"])
        return [f"perplexity {facts['perplexity']:.2f} (of what it was made of: {parents})"]
    return [f"base: {facts['base']}", *(_parity_line(row) for row in facts["parity"])]


def _parity_line(row: Mapping[str, Any]) -> str:
    """What was measured in one dtype, and what the parent's own rounding was allowed on top of the tolerances."""
    words = f"{row['dtype']}: largest difference of a logit {row['max_difference']:.2g}, {_distance_words(row)}"
    if row["perplexity"] is not None:
        words += f", perplexity {row['perplexity']:.2f} (adapter {row['parent_perplexity']:.2f})"
    if row["rounding"] is None:
        return words
    return f"{words}; rounding alone, allowed on top of the tolerances: {_distance_words(row['rounding'])}"


def _distance_words(row: Mapping[str, Any]) -> str:
    greedy = "" if row["greedy"] is None else f", greedy {row['greedy']:.2%}"
    return f"KL {row['kl']:.2g}, top-1 {row['top1']:.2%}{greedy}"
