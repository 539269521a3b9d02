"""The screen: a live bar with its figures on a terminal, whole plain lines elsewhere, the same words on both."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from kajiya.screen import Screen

Event = tuple[str, dict[str, Any]]
BEGUN: Event = ("stage", {"name": "train", "state": "begun", "seconds": 0.0, "text": ""})
LOGGED: Event = ("metrics", {"step": 4, "values": {"train/nll": 2.5, "train/tokens_per_second": 1234.0}})
ALONG: Event = ("progress", {"stage": "train", "done": 5, "total": 10, "unit": "steps"})


def ended(state: str, text: str = "10 of 10 steps", name: str = "train") -> Event:
    return "stage", {"name": name, "state": state, "seconds": 3.0, "text": text}


def shown(*events: Event, is_terminal: bool) -> str:
    """All that was written while these events came."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=120, _environ={"TERM": "xterm-256color"})
    with Screen(console) as screen:
        for kind, fields in events:
            screen.on_event(kind, **fields)
    return file.getvalue()


def words(text: str) -> str:
    """What is left of it without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_has_a_bar_with_the_last_figures() -> None:
    text = shown(BEGUN, LOGGED, ALONG, is_terminal=True)
    assert "\x1b[" in text
    assert re.search(r"━.* 5/10 .*loss 2\.500 · 1,234 tokens/s", words(text))
    assert "5 of 10" not in words(text), "the lines of a pipe are not for a terminal"


def test_the_bar_goes_with_its_stage() -> None:
    text = shown(BEGUN, ALONG, ended("done"), is_terminal=True)
    behind = text.partition("✓")[2]
    assert behind
    assert "━" not in behind
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_a_bar_without_a_total_shows_its_unit() -> None:
    reading = ("progress", {"stage": "corpus", "done": 7, "total": None, "unit": "documents"})
    begun = ("stage", {"name": "corpus", "state": "begun", "seconds": 0.0, "text": ""})
    assert re.search(r"7/\? .*documents", words(shown(begun, reading, is_terminal=True)))


def test_a_pipe_has_a_line_each_tenth_and_no_control_codes() -> None:
    steps = [("progress", {"stage": "train", "done": n, "total": 40, "unit": "steps"}) for n in range(41)]
    text = shown(BEGUN, LOGGED, *steps, ended("done"), is_terminal=False)
    assert "\x1b" not in text
    assert len(re.findall(r"^  \d+ of 40 steps \(\d+ %\) loss 2\.500 · 1,234 tokens/s$", text, re.M)) == 11


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    ("event", "said"),
    [
        (ended("done"), "✓ 10 of 10 steps · 3.0 s"),
        (ended("reused"), "✓ 10 of 10 steps · unchanged, reused"),
        (ended("stopped"), "■ 10 of 10 steps · stopped"),
        (("metrics", {"step": 6, "values": {"eval/nll": 2.0}}), "step 6: held-out loss 2.000 nats per token"),
        (("metrics", {"step": 6, "values": {"eval/loss": 2.0, "eval/accuracy": 0.5}}), "loss 2.000, accuracy 0.500"),
        (("started", {"attempt": 2, "resumed_from": 1200}), "going on from the checkpoint of step 1,200 (attempt 2)"),
        (("ledger", {"text": "3 rows", "facts": {}}), "Ledger: 3 rows"),
        (("warning", {"text": "no [compiler]"}), "warning: no [compiler]"),
        (("note", {"text": "a [note]"}), "a [note]"),
        (("member", {"text": "seed=1: finished"}), "seed=1: finished"),
        (
            (
                "trial",
                {"number": 3, "status": "finished", "values": [2.5], "problem": None, "run": "a", "seconds": 3.0},
            ),
            "trial 3: finished 2.5 · 3.0 s",
        ),
    ],
)
def test_every_event_has_its_words(event: Event, said: str, is_terminal: bool) -> None:
    assert said in words(shown(BEGUN, event, is_terminal=is_terminal))


def test_what_says_nothing_is_passed_over() -> None:
    assert shown(("artifact", {"name": "corpus", "path": "p"}), is_terminal=False) == ""
