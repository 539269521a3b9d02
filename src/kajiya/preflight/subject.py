"""What is proven before a run, and what a check says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kajiya.config.schema import Config
from kajiya.data.shards import Split
from kajiya.run.store import Artifact
from kajiya.training.fit import Setup

SKIPPED_BY_HAND = "by preflight.skip"
"""What a finding says of a check that the config skips."""


@dataclass(frozen=True)
class Subject:
    """A run that is about to begin: everything as it will be, before its first step."""

    config: Config
    setup: Setup
    tokenizer: Any
    corpus: Artifact
    shards: Split
    """The training split, which the rows say their places in."""
    plan: Mapping[str, Any]
    """Facts of the plan: `peak_bytes` of its measured steps, `tokens` and `epochs` of the run, …"""
    save: Callable[[Path], object]
    """Write what training leaves, as it stands, into a folder."""
    reopen: Callable[[Path], Any] | None
    """The model of a folder that `save` wrote; `None` where only the run itself can build it (the user's own module)."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: str
    """passed, failed or skipped."""
    text: str
    """What was proven, with the figure; or what is wrong; or why it was skipped."""
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def passed(text: str, **figures: Any) -> Finding:
    """The finding of a check that holds; its name is filled in by who ran it."""
    return Finding("", "passed", text, "", figures)


def failed(text: str, remedy: str, **figures: Any) -> Finding:
    """The finding of a check that does not hold."""
    return Finding("", "failed", text, remedy, figures)


def skipped(text: str, **figures: Any) -> Finding:
    """The finding of a check that says nothing here."""
    return Finding("", "skipped", text, "", figures)
