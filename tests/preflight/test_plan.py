"""The length of a run from its time, and what a run that goes on keeps of the settings that were measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kajiya.config.compose import compose
from kajiya.config.schema import Config
from kajiya.data.progress import silent
from kajiya.flows.fitting import _resolve_precision, plan_only
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data
from kajiya.preflight.plan import _steps
from kajiya.run.store import Store
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


_ROWS = """
name: sums
data: {source: {name: jsonl, options: {files: FILES}}, row_tokens: 256, heldout_every: 5, packing: bucketed}
tokenizer: {vocab_size: 270}
model: {n_params: null, hidden_size: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, ffn_size: 16, max_positions: 256}
train: {steps: 3, micro_batch: 4, precision: fp32, compile: "off"}
"""


def test_rows_as_long_as_their_sequences_are_counted_as_they_are(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{n} and {n} are", "completion": str(2 * n)}) for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows.yaml").write_text(_ROWS.replace("FILES", str(tmp_path / "rows.jsonl")))
    config, store = compose(str(tmp_path / "rows.yaml")), Store(tmp_path / "store")
    data = prepare_data(config, store, Stages(silent))
    plan, _ = plan_only(config, data, store)
    assert data.packing is not None
    packed = data.packing.facts["train"]
    assert plan.tokens_per_step == round(4 * packed["tokens"] / packed["examples"]) < 4 * 256 / 2
    assert plan.tokens == 3 * plan.tokens_per_step
    assert plan.tokens_per_second == pytest.approx(plan.tokens_per_step / plan.step_seconds)
    assert plan.epochs == pytest.approx(3 * 4 / packed["examples"])
