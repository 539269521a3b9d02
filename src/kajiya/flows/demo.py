"""The demo: the standard library's recipe, cut to a time."""

from collections.abc import Sequence

from kajiya.config.compose import compose
from kajiya.config.schema import Config

_RECIPE = "stdlib-pretrain"
_LONG_RECIPE = "stdlib-pretrain-long"
_LONG_MINUTES = 10.0
_OTHER_STAGES_MINUTES = 1.1
"""Reading, tokenizing, baselines, evaluation and report on two cores, and some room for a machine that slows down."""


def demo_config(minutes: float, overrides: Sequence[str]) -> Config:
    """The config of a demo that takes about `minutes` in all; from ten minutes on a larger model is worth it."""
    recipe = _LONG_RECIPE if minutes >= _LONG_MINUTES else _RECIPE
    training = max(0.2, minutes - _OTHER_STAGES_MINUTES)
    return compose(recipe, [f"train.minutes={training:g}", *overrides])
