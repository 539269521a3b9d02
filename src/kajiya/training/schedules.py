"""Learning-rate schedules: the factor on the peak rate as a function of progress, 0 at the end of warm-up and 1 at the end.

The one clock is the optimizer step: step 1 is the first update. Warm-up is common to all and stands in `lr_at`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from kajiya.config.options import CosineOptions, InverseSqrtOptions, LinearOptions, NoOptions, WSDOptions
from kajiya.config.schema import ScheduleConfig
from kajiya.config.tables import is_options, resolve


def load_schedule(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at each step 1 … `steps`: linear warm-up, then the named curve."""
    function, options = resolve("schedule", config.name, config.options, "schedule")
    curve: Callable[[float], float] = (
        partial(function, options=options) if is_options(options) else partial(function, **options)
    )
    warmup = round(config.warmup_fraction * steps)
    return partial(_factor, warmup=warmup, steps=steps, curve=curve)


def _factor(step: int, warmup: int, steps: int, curve: Callable[[float], float]) -> float:
    if step <= warmup:
        return step / warmup
    # The last step still learns a little: progress reaches 1 one step behind the end.
    return curve((step - 1 - warmup) / max(1, steps - warmup))


def constant(progress: float, options: NoOptions) -> float:
    """The peak rate throughout."""
    return 1.0


def cosine(progress: float, options: CosineOptions) -> float:
    """min + (1 − min) · (1 + cos π p) / 2 (arXiv:1608.03983, equation 5)."""
    return options.min_ratio + (1 - options.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, options: LinearOptions) -> float:
    """1 − (1 − min) · p."""
    return 1 - (1 - options.min_ratio) * progress


def inverse_sqrt(progress: float, options: InverseSqrtOptions) -> float:
    """√(s / (s + p)) (arXiv:1706.03762, equation 3, with s the warm-up's share of the steps after it)."""
    return math.sqrt(options.timescale / (options.timescale + progress))


def wsd(progress: float, options: WSDOptions) -> float:
    """The peak rate, then a straight line to the floor over the last `decay_fraction` (arXiv:2404.06395, section 4)."""
    left = (1 - progress) / options.decay_fraction
    return options.min_ratio + (1 - options.min_ratio) * min(1.0, left)


def curve_points(schedule: Callable[[int], float], steps: int, n: int = 60) -> list[tuple[int, float]]:
    """At most `n` points (step, factor) of the curve, first and last included, to draw it."""
    marks: Any = {1 + round(i * (steps - 1) / max(1, n - 1)) for i in range(n)}
    return [(step, schedule(step)) for step in sorted(marks)]
