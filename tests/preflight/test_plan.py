"""The length of a run from its time, and what a run that goes on keeps of the settings that were measured."""

from dataclasses import replace

import pytest
import torch

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.flows.fitting import _resolve_precision
from kajiya.preflight.plan import _steps
from kajiya.training.probe import StepCost
from kajiya.training.ranks import find_ranks

COST = StepCost(
    step_seconds=0.5, warmup_seconds=4.0, measured_seconds=6.0, peak_bytes=1, optimizer_bytes=1, measured_steps=12
)


def _config(**train: float | None) -> Config:
    return compose(
        "stdlib-pretrain", [f"train.{name}={'null' if value is None else value}" for name, value in train.items()]
    )


@pytest.mark.parametrize(
    ("train", "spent_s", "steps"),
    [
        ({"minutes": 2}, 10.0, 190),  # 120 s, less 10, 4 and 6, of which a twentieth is kept for evaluations
        ({"minutes": 2}, 70.0, 76),
        ({"minutes": 0.3}, 10.0, 1),  # all of it is gone already
        ({"minutes": None, "epochs": 1.5}, 10.0, 16),
        ({"minutes": None, "epochs": 0.01}, 10.0, 1),
        ({"minutes": None, "steps": 7}, 1000.0, 7),
    ],
)
def test_steps_of_a_time_of_epochs_and_as_they_are_set(train: dict[str, float], spent_s: float, steps: int) -> None:
    assert _steps(_config(**train), COST, steps_per_epoch=10.5, spent_s=spent_s) == steps


def test_a_slower_step_makes_a_shorter_run() -> None:
    slower = replace(COST, step_seconds=1.0)
    assert _steps(_config(minutes=2), slower, steps_per_epoch=1.0, spent_s=10.0) == 95


@pytest.mark.parametrize("picked", ["fp32", "bf16"])
def test_a_run_that_goes_on_keeps_the_precision_that_auto_picked(picked: str) -> None:
    """Whatever this machine would pick now."""
    settled, cpu, ranks = {"train.precision": picked}, torch.device("cpu"), find_ranks("auto")
    kept = _resolve_precision(compose("stdlib-pretrain", ["train.precision=auto"]), settled, cpu, ranks)
    assert (kept.name, kept.reason) == (picked, "auto picked it when the run began")
    said = _resolve_precision(compose("stdlib-pretrain", ["train.precision=bf16-mixed"]), settled, cpu, ranks)
    assert said.name == "bf16-mixed"
