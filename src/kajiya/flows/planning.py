"""The plan of a run from its config and its data: what a step costs is measured, or found where it was measured before."""

import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from kajiya.config.schema import Config
from kajiya.data.shards import open_split
from kajiya.flows.feeding import Data, Feeds, packing_of
from kajiya.flows.prove import proof_section
from kajiya.preflight.plan import Plan, make_plan
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.provenance import machine_facts
from kajiya.run.store import Store, produce
from kajiya.training.fit import Setup
from kajiya.training.probe import StepCost, measure_steps

_ENOUGH_S = {"by time": 2.0, "by steps": 0.2}
"""How long steps are measured: where the length of the run comes from it, and where only its words do, seconds."""


def plan_run(
    config: Config, setup: Setup, feeding: Feeds, data: Data, *, compiled: str, began: float, store: Store | None
) -> Plan:
    """The plan; `began` is when the time of `train.minutes` began (`time.perf_counter()`).

    With a `store`, a cost that was measured before on this machine is taken, unless the length of the run comes from it.
    """
    fill = 1.0
    if data.packing is None:
        tokens = open_split(data.shards.path, "train").n_tokens
    else:
        tokens = feeding.loader().rows_per_epoch * feeding.row_tokens
        if packing_of(config, data.corpus.facts["format"]).name == "bucketed":
            fill = data.packing.facts["train"]["tokens"] / tokens
    spent = time.perf_counter() - began
    is_by_time = config.train.minutes is not None

    def measure() -> StepCost:
        loader: Any = setup.loader
        # Of answers that are drawn it is one of the longest that they may be, which no model needs to write for it.
        return measure_steps(setup, _ENOUGH_S["by time" if is_by_time else "by steps"], loader.heaviest())

    cost = measure() if store is None or is_by_time else _kept_cost(config, setup, data, store, measure)
    return make_plan(
        config,
        setup,
        cost,
        tokens_per_epoch=tokens,
        row_tokens=feeding.row_tokens,
        fill=fill,
        spent_s=spent,
        compiled=compiled,
    )


def _kept_cost(config: Config, setup: Setup, data: Data, store: Store, measure: Callable[[], StepCost]) -> StepCost:
    section = proof_section(config) | {
        "optim": replace(config.optim, lr=1.0),
        "schedule": None,
        "preflight": None,
        "precision": setup.precision.name,
        "device": str(setup.strategy.device),
        "threads": torch.get_num_threads(),
        "machine": machine_facts(),
    }

    def keep(folder: Path) -> dict[str, Any]:
        facts = asdict(measure())
        write_json(folder / "cost.json", facts)
        return facts

    made, _ = produce(
        store,
        "cost",
        code=code_revision("kajiya.flows.fitting"),
        config=section,
        parents=data.artifacts(),
        make=keep,
    )
    return StepCost(**{field.name: made.facts[field.name] for field in fields(StepCost)})
