"""What theory has for a first loss: where it must lie, in which words, and what to do where it does not."""

from dataclasses import dataclass
from typing import Any

from kajiya.config.tables import check_choice
from kajiya.preflight.subject import Finding, Subject

NOT_THE_BASE = ("prefix", "prompt", "load")
"""Adapters with which a model begins as another than its base."""
STD_REMEDY = "Look at model.init_std: larger ones make a model sure of nonsense."


@dataclass(frozen=True)
class Expected:
    """Where theory has the first loss."""

    low: float
    high: float
    words: str
    """To be read behind "the first loss is …" and "the first loss is not …"."""
    remedy: str


Theory = tuple[Expected, ...] | Finding
"""All that must hold of the first loss; or that it says nothing here, with the reason, or what is wrong before any loss."""


def is_random(subject: Subject) -> bool:
    """Whether the weights are random ones of `model.init_std`."""
    model = subject.config.model
    return model.path is None and model.init == "normal"


def loss_options(subject: Subject) -> Any:
    """The options of the config's loss."""
    loss = subject.config.train.loss
    return check_choice("loss", loss.name, loss.options, "train.loss")
