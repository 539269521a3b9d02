"""The plan and the proof of a recipe without a run."""

import time
from dataclasses import replace
from typing import Any

from kajiya.config.schema import Config
from kajiya.data.progress import OnEvent, silent
from kajiya.flows.bases import find_bases
from kajiya.flows.fitting import plan_only, prove_only
from kajiya.flows.stages import Stages
from kajiya.flows.train import prepare_data
from kajiya.preflight.plan import plan_facts
from kajiya.run.process import set_up_process
from kajiya.run.store import Store


def plan_recipe(config: Config, store: Store, on_event: OnEvent = silent) -> dict[str, Any]:
    """Facts of the plan, with the derived settings; the data are prepared (and kept), nothing is trained."""
    set_up_process(config.seed, store.root, config.train.deterministic, fp32_matmul=config.train.fp32_matmul)
    store = store.heard_by(on_event)
    config = find_bases(config, store, on_event).config
    data = prepare_data(config, store, Stages(on_event))
    on_event("stage", name="plan", state="begun", seconds=0.0, text="")
    began = time.perf_counter()
    plan, derived = plan_only(config, data, store)
    facts = plan_facts(plan)
    on_event("plan", facts=facts)
    on_event("stage", name="plan", state="done", seconds=time.perf_counter() - began, text="")
    return facts | {"derived": derived}


def prove_recipe(
    config: Config, store: Store, on_event: OnEvent = silent, threads: int | None = None
) -> dict[str, Any]:
    """The verdict on a recipe; nothing is trained. Raises `ProofError` for checks that fail.

    `threads` of torch; `None`: what `default_threads` says.
    """
    set_up_process(config.seed, store.root, config.train.deterministic, threads, config.train.fp32_matmul)
    store = store.heard_by(on_event)
    based = find_bases(config, store, on_event)
    data = replace(prepare_data(based.config, store, Stages(on_event)), bases=based.parents)
    return prove_only(based.config, data, store, on_event)
