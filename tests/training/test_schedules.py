"""Each schedule against its formula, on the one clock."""

import math
from collections.abc import Callable

import pytest

from kajiya.config.schema import ScheduleConfig
from kajiya.config.tables import TABLES
from kajiya.training.schedules import curve_points, load_schedule

STEPS = 200
FORMULAS: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "inverse_sqrt": lambda p: math.sqrt(0.02 / (0.02 + p)),
    "linear": lambda p: 1 - p,
    "wsd": lambda p: 1.0 if p <= 0.6 else (1 - p) / 0.4,
}


def test_every_schedule_has_its_formula() -> None:
    assert set(FORMULAS) == set(TABLES["schedule"])


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_the_curve(name: str, warmup: float) -> None:
    factor = load_schedule(ScheduleConfig(name=name, warmup_fraction=warmup), STEPS)
    n_warm = round(warmup * STEPS)
    for step in range(1, STEPS + 1):
        if step <= n_warm:
            assert factor(step) == pytest.approx(step / n_warm)
        else:
            assert factor(step) == pytest.approx(FORMULAS[name]((step - 1 - n_warm) / (STEPS - n_warm)))
    assert max(factor(step) for step in range(1, STEPS + 1)) == pytest.approx(1.0, abs=1e-9)
    assert factor(STEPS) > 0


def test_inverse_sqrt_is_that_of_the_paper() -> None:
    """step^-1/2 behind a warm-up of w steps, over its peak: √(w / step); the clock of ours stands one step behind its end."""
    factor = load_schedule(
        ScheduleConfig(name="inverse_sqrt", warmup_fraction=0.1, options={"timescale": 100 / 900}), 1000
    )
    for step in (101, 200, 500, 1000):
        assert factor(step) == pytest.approx(math.sqrt(100 / (step - 1)))


def test_a_floor_is_kept() -> None:
    factor = load_schedule(ScheduleConfig(name="cosine", options={"min_ratio": 0.1}), 1000)
    assert factor(1000) == pytest.approx(0.1, abs=1e-3)


def test_the_drawn_curve_has_both_ends() -> None:
    points = curve_points(load_schedule(ScheduleConfig(), 37), 37)
    assert points[0][0] == 1
    assert points[-1][0] == 37


def test_a_schedule_of_ones_own() -> None:
    factor = load_schedule(ScheduleConfig(name="math:cos", warmup_fraction=0.0), 10)
    assert factor(6) == pytest.approx(math.cos(0.5))
