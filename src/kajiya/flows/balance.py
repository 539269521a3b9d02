"""Whether good and bad answers, as they are weighed, are in the proportion that KTO wants."""

from pathlib import Path

import numpy as np

from kajiya.config.schema import LossConfig
from kajiya.config.tables import check_choice
from kajiya.data.shards import open_split

_LEAST, _MOST = 1.0, 4 / 3
"""Weight of all good answers over that of all bad ones (Ethayarajh et al., arXiv:2402.01306, equation 9)."""
_SLACK = 1.1
"""By how much that may be missed without a word: labels that are drawn evenly are never quite even."""


def balance_words(loss: LossConfig, shards: Path) -> str | None:
    """What weights would balance the training answers' labels; `None` where they are, to a tenth, or are no such labels."""
    labels = open_split(shards, "train").labels
    if loss.name != "kto" or labels is None:
        return None
    options = check_choice("loss", loss.name, loss.options, "train.loss")
    good, bad = int((np.asarray(labels) > 0.5).sum()), int((np.asarray(labels) <= 0.5).sum())
    if not good or not bad:
        return f"all {good or bad:,} answers are {'good' if good else 'bad'} ones: KTO learns from both"
    ratio = good * options.desirable_weight / (bad * options.undesirable_weight)
    if _LEAST / _SLACK <= ratio <= _MOST * _SLACK:
        return None
    field, low, high = (
        ("desirable_weight", _LEAST * bad / good, _MOST * bad / good)
        if ratio < _LEAST
        else ("undesirable_weight", good / (bad * _MOST), good / (bad * _LEAST))
    )
    other = options.undesirable_weight if ratio < _LEAST else options.desirable_weight
    return (
        f"{good:,} good and {bad:,} bad answers weigh {ratio:.3g} to 1 as they are, and KTO is held to be best between 1 and 1.33 "
        f"to 1: train.loss.options.{field} between {low * other:.3g} and {high * other:.3g} balances them"
    )
