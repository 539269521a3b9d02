"""What a person sees of a flow: plain words at each stage, a progress bar where stdout is a terminal, plain lines where not."""

import shlex
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kajiya.config.quantities import format_seconds
from kajiya.listings import print_table

if TYPE_CHECKING:
    from kajiya.flows.train import Trained

_STAGE_WORDS = {
    "corpus": "Reading, deduplicating and splitting the text",
    "tokenizer": "Training the tokenizer",
    "shards": "Tokenizing into shards",
    "packing": "Packing whole examples into rows",
    "plan": "Planning: measuring a few steps",
    "find-lr": "Looking for a learning rate",
    "prove": "Proving what can go wrong silently",
    "train": "Training",
    "baselines": "Measuring the compressors on the same bytes",
    "evaluation": "Evaluating on the held-out text",
    "report": "Writing the report",
    "search": "Searching",
    "multirun": "Training every combination",
    "confirm": "The best two and the recipe over fresh seeds",
}
_SHOWN = ("eval/accuracy", "eval/rewards/accuracies", "eval/absolute_error")
"""Held-out figures that are shown beside the loss."""


class Screen:
    """Hears the events of a flow (`on_event`) and shows them; use it as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._note = ""
        self._last_percent = -1

    def __enter__(self) -> Self:
        if self._is_live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._progress.stop()

    def on_event(self, kind: str, **fields: Any) -> None:
        """Show one event; kinds that have nothing to say on a screen are passed over."""
        shows: dict[str, Callable[..., None]] = {
            "stage": self._stage,
            "progress": self._show_progress,
            "metrics": self._metrics,
            "plan": self._plan,
            "proof": self._proof,
            "started": self._started,
            "ledger": self._ledger,
            "warning": self._warning,
            "note": self._note_said,
            "trial": self._trial,
            "member": self._member,
        }
        if kind in shows:
            shows[kind](**fields)

    def say(self, text: str) -> None:
        """One line of plain words."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _stage(self, name: str, state: str, seconds: float, text: str) -> None:
        self._end_task()
        words = _STAGE_WORDS.get(name, name)
        if state == "begun":
            self._note, self._last_percent = "", -1
            self.say(f"[bold]{words}[/bold] …")
            if self._is_live:
                self._task = self._progress.add_task("", total=None, note="")
            return
        ending = {"done": format_seconds(seconds), "reused": "unchanged, reused", "stopped": "stopped"}[state]
        self.say(
            f"  [green]{'✓' if state != 'stopped' else '■'}[/green] {_escape(text)}{' · ' if text else ''}[dim]{ending}[/dim]"
        )

    def _show_progress(self, stage: str, done: int, total: int | None, unit: str) -> None:
        if self._is_live:
            if self._task is not None:
                self._progress.update(self._task, completed=done, total=total, note=self._note or unit)
            return
        percent = 100 * done // total if total else 0
        if stage == "train" and percent // 10 > self._last_percent // 10:
            self._last_percent = percent
            self.say(f"  {done:,} of {total or 0:,} {unit} ({percent} %) {self._note}".rstrip())

    def _metrics(self, step: int, values: dict[str, float]) -> None:
        if "train/nll" in values:
            speed = values["train/tokens_per_second"]
            self._note = f"loss {values['train/nll']:.3f} · {speed:,.0f} tokens/s"
        elif "train/loss" in values:
            self._note = f"loss {values['train/loss']:.3f} · {values['train/tokens_per_second']:,.0f} tokens/s"
        told = (
            f", {name.removeprefix('task/')} {value:.4g}" for name, value in values.items() if name.startswith("task/")
        )
        tasks = "".join(told)
        if "eval/loss" in values:
            rest = "".join(f", {name.removeprefix('eval/')} {values[name]:.3f}" for name in _SHOWN if name in values)
            self.say(f"  step {step:,}: held-out loss {values['eval/loss']:.3f}{rest}{tasks}")
        elif "eval/nll" in values:
            self.say(f"  step {step:,}: held-out loss {values['eval/nll']:.3f} nats per token{tasks}")

    def _plan(self, facts: dict[str, Any]) -> None:
        from kajiya.preflight.plan import plan_lines

        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, words in plan_lines(facts):
            table.add_row(f"[dim]{name}[/dim]", _escape(words))
        print_table(self._console, table)

    def _proof(self, facts: dict[str, Any]) -> None:
        marks = {"passed": "[green]✓[/green]", "failed": "[red]✗[/red]", "skipped": "[dim]–[/dim]"}
        table = Table(show_header=False, box=None, padding=(0, 1))
        for row in facts["findings"]:
            by_hand = row["text"] == "by preflight.skip"
            words = f"[red]skipped {row['text']}[/red]" if by_hand else _escape(row["text"])
            table.add_row(marks[row["state"]], f"[dim]{row['name']}[/dim]", words)
        print_table(self._console, table)

    def _started(self, attempt: int, resumed_from: int | None) -> None:
        if resumed_from is not None:
            self.say(f"  going on from the checkpoint of step {resumed_from:,} (attempt {attempt})")

    def _ledger(self, text: str, facts: dict[str, Any]) -> None:
        self.say(f"[bold]Ledger[/bold]: {_escape(text)}")

    def _trial(
        self, number: int, status: str, values: list[float] | None, problem: str | None, run: str | None, seconds: float
    ) -> None:
        said = ", ".join(f"{value:.5g}" for value in values) if values else problem or ""
        self.say(f"  trial {number}: {status} {_escape(said)} · {format_seconds(seconds)}")

    def _member(self, text: str) -> None:
        self.say(f"  {_escape(text)}")

    def _warning(self, text: str) -> None:
        self.say(f"  [yellow]warning:[/yellow] {_escape(text)}")

    def _note_said(self, text: str) -> None:
        self.say(f"  {_escape(text)}")

    def _end_task(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.refresh()  # else the next line is printed above the bar as it was
            self._task = None


def say_outcome(console: Console, trained: "Trained", command: list[str]) -> None:
    """The last words of a training: what came of it, where it is, or how to go on."""
    for text in trained.warnings:
        console.print(f"[yellow]warning:[/yellow] {_escape(text)}", highlight=False, soft_wrap=True)
    if trained.model is None:
        console.print(
            "Stopped after a whole step; the state is saved. The same command goes on from it:", highlight=False
        )
        _say_command(console, command)
        return
    console.print(f"Run:    {trained.run.id}", highlight=False, soft_wrap=True)
    console.print(f"Model:  {trained.model.path}", highlight=False, soft_wrap=True, markup=False)
    if trained.report is not None:
        console.print(f"Report: {trained.report}", highlight=False, soft_wrap=True, markup=False)


def say_interrupted(console: Console, command: list[str]) -> None:
    """The last words of work that a signal ended where there is no step to finish."""
    console.print("Interrupted. What was finished is kept; the same command goes on where it was:", highlight=False)
    _say_command(console, command)


def _say_command(console: Console, command: list[str]) -> None:
    console.print("  " + shlex.join(command), highlight=False, soft_wrap=True, markup=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
