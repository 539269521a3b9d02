"""The plan: what the run is, what it will cost, and the learning rate as it will be; before a step is spent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kajiya.config.quantities import format_bytes, format_count, format_seconds
from kajiya.config.schema import Config
from kajiya.models.quantized import count_params
from kajiya.training.fit import Setup
from kajiya.training.flops import flops_per_token
from kajiya.training.portions import rows_of_step
from kajiya.training.probe import StepCost
from kajiya.training.ranks import find_ranks
from kajiya.training.schedules import curve_points, load_schedule


@dataclass(frozen=True)
class Plan:
    """Figures of a run before it begins. Times in seconds, memory in bytes."""

    n_params: int
    n_trainable: int
    steps: int
    tokens_per_step: int
    tokens: int
    epochs: float
    tokens_per_param: float
    flops_per_token: float
    step_seconds: float
    warmup_seconds: float
    train_seconds: float
    tokens_per_second: float
    peak_bytes: int
    state_bytes: int
    checkpoint_bytes: int
    precision: str
    precision_reason: str
    compiled: str
    lr_curve: list[tuple[int, float]]
    n_ranks: int = 1
    size_note: str = ""
    """By what `model.n_params` was missed, and what of the weights an adapter and `model.quantize` leave out; empty: nothing."""


def plan_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a plan as pairs of words, for a table on the screen or in the report."""
    n_params, tokens, steps = facts["n_params"], facts["tokens"], facts["steps"]
    speed = f"{facts['tokens_per_second']:,.0f} tokens/s (measured), {facts['step_seconds'] * 1000:.0f} ms a step"
    memory = (
        f"{format_bytes(facts['peak_bytes'])} peak, of it {format_bytes(facts['state_bytes'])} weights and optimizer"
    )
    return [
        ("parameters", "; ".join(filter(None, (_trained_words(n_params, facts["n_trainable"]), facts["size_note"])))),
        ("precision", f"{facts['precision']}: {facts['precision_reason']}"),
        ("compiled", facts["compiled"]),
        ("steps", f"{steps:,} of {facts['tokens_per_step']:,} tokens"),
        (
            "tokens",
            f"{format_count(tokens)}, {facts['epochs']:.2f} epochs, {facts['tokens_per_param']:.1f} a parameter",
        ),
        ("speed", speed),
        ("training", format_seconds(facts["train_seconds"])),
        ("memory", memory),
        ("checkpoint", format_bytes(facts["checkpoint_bytes"])),
    ]


def _trained_words(n_params: int, n_trainable: int) -> str:
    if n_trainable == n_params:
        return f"{format_count(n_params)}, all trained"
    share = f"{100 * n_trainable / n_params:.2g}"
    return f"{format_count(n_params)}, {format_count(n_trainable)} ({share} %) trained"


def make_plan(
    config: Config,
    setup: Setup,
    cost: StepCost,
    *,
    tokens_per_epoch: int,
    row_tokens: int,
    fill: float = 1.0,
    spent_s: float,
    compiled: str,
) -> Plan:
    """Derive from what a step costs what the config leaves open.

    `tokens_per_epoch` is the training split's, `row_tokens` a whole row's, `fill` the share of a row that there is where rows are
    as long as their sequences, `spent_s` the seconds of `train.minutes` that are already gone.
    """
    whole_per_step = row_tokens * rows_of_step(config.train)
    steps = _steps(config, cost, tokens_per_epoch / whole_per_step, spent_s)
    tokens_per_step = round(fill * whole_per_step)
    n_params = count_params(setup.model)
    n_trainable = count_params(setup.model, trainable=True)
    optimizer = setup.optimizer
    shared = sum(t.numel() * 4 for name, t in optimizer.masters.items() if t is optimizer.parameters[name])
    model_bytes = sum(t.numel() * t.element_size() for t in setup.model.parameters())
    return Plan(
        n_params=n_params,
        n_trainable=n_trainable,
        steps=steps,
        tokens_per_step=tokens_per_step,
        tokens=steps * tokens_per_step,
        epochs=steps * whole_per_step / tokens_per_epoch,
        tokens_per_param=steps * tokens_per_step / n_params,
        flops_per_token=flops_per_token(setup.model, config.data.row_tokens),
        step_seconds=cost.step_seconds,
        warmup_seconds=cost.warmup_seconds,
        train_seconds=steps * cost.step_seconds,
        tokens_per_second=tokens_per_step / cost.step_seconds,
        peak_bytes=cost.peak_bytes,
        state_bytes=model_bytes + cost.optimizer_bytes - shared,
        checkpoint_bytes=cost.optimizer_bytes,
        precision=setup.precision.name,
        precision_reason=setup.precision.reason,
        compiled=compiled,
        lr_curve=[(s, config.optim.lr * f) for s, f in curve_points(load_schedule(config.schedule, steps), steps)],
        n_ranks=find_ranks(config.train.strategy).n,
    )


def with_schedule(setup: Setup, config: Config, steps: int) -> Setup:
    """The setup with its length and its learning rate settled."""
    factor = load_schedule(config.schedule, steps)
    return replace(setup, steps=steps, lr=lambda step: config.optim.lr * factor(step))


def _steps(config: Config, cost: StepCost, steps_per_epoch: float, spent_s: float) -> int:
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * steps_per_epoch))
    if train.minutes is None:
        raise AssertionError("validate() lets no config without a length through")
    # Evaluations and checkpoints along the way take a few hundredths of the time.
    left = (60 * train.minutes - spent_s - cost.warmup_seconds - cost.measured_seconds) * 0.95
    return max(1, int(left / cost.step_seconds))


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan for a manifest."""
    from kajiya.config.digest import to_plain

    facts: dict[str, Any] = to_plain(plan)
    return facts
