"""The training of one run: set up, measure, go on from the last checkpoint, fit with its hooks, save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.config.schema import Config
from kajiya.data.bigrams import Bigrams, count_bigrams
from kajiya.data.progress import OnEvent
from kajiya.data.shards import open_split
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import StoreError
from kajiya.flows.feeding import Data, Feeding, build_reference, open_feeding, task_of
from kajiya.flows.heldout import heldout_values
from kajiya.models.bigram_init import begin_from_bigrams
from kajiya.models.build import build_model, vocabulary_of
from kajiya.models.induction_init import begin_with_induction
from kajiya.models.outputs import decoder_start
from kajiya.models.save import save_model
from kajiya.preflight.plan import Plan, make_plan, plan_facts, with_schedule
from kajiya.run.folder import Run
from kajiya.run.store import Artifact, Store
from kajiya.training.checkpoint import (
    checkpoint_name,
    disown_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from kajiya.training.compile import compile_blocks, compiler_problem
from kajiya.training.fit import Hook, Setup, StepReport, drain_window, fit
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.optimizers import load_optimizer
from kajiya.training.precision import resolve_device, resolve_precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import SingleProcess

_COMPILE_PAYS_MINUTES = 6.0
_COMPILE_PAYS_STEPS = 1000
"""A run shorter than this does not repay the compilation (about half a minute on a CPU, for steps 5 to 15 % faster)."""
_TIMES_A_RUN = 10
_LONGEST_UNSAVED_S = 600.0
"""Evaluations and checkpoints of a run whose config does not say how often."""

_BEGINNINGS: dict[str, Callable[[Any, Bigrams, int], object]] = {
    "bigram": begin_from_bigrams,
    "induction": begin_with_induction,
}
"""What sets the weights of a model from scratch beyond their random values."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained, and the settings that were derived for it."""

    setup: Setup
    derived: dict[str, Any]
    compiled: str
    feeding: Feeding
    reference: Artifact | None


@dataclass(frozen=True)
class Fitted:
    """A finished training, still in memory."""

    setup: Setup
    state: TrainState
    derived: dict[str, Any]


def prepare(config: Config, data: Data, store: Store, settled: dict[str, Any]) -> Prepared:
    """Model, optimizer, loader and loss of the config; its length is not settled yet (`steps=1`).

    `settled` holds derived values of an earlier attempt of the same run, which are kept. What the loss compares with is
    computed with the model as it is before training, or found in the store.
    """
    device = resolve_device(config.train.device, "train.device")
    precision = resolve_precision(settled.get("train.precision", config.train.precision), device)
    vocabulary = load_tokenizer(data.tokenizer.path)
    known = vocabulary_of(vocabulary, data.tokenizer.facts["added_tokens"])
    built = build_model(config.model, known, config.seed, task_of(config, data.corpus))
    if config.model.init in _BEGINNINGS:
        _BEGINNINGS[config.model.init](built.module, count_bigrams(data.shards.path, len(vocabulary)), config.seed)
    strategy = SingleProcess(device, precision)
    model = strategy.prepare(built.module)
    if config.train.gradient_checkpointing:
        _recompute_activations(model)
    compiled = _compile(config, model, device)
    made = build_reference(config, data, model, precision, store)
    reference = None if made is None else made[0]
    feeding = open_feeding(config, data, reference, start_id=decoder_start(model))
    setup = Setup(
        model=model,
        loss=load_loss(config.train.loss, device),
        measure=load_measure(config.train.loss),
        loader=feeding.loader(),
        optimizer=load_optimizer(config.optim, model, config.train.ema_decay),
        strategy=strategy,
        precision=precision,
        lr=lambda _step: config.optim.lr,
        steps=1,
        accumulate=config.train.accumulate,
        clip_norm=config.optim.clip_norm,
        max_skipped=config.optim.max_skipped,
        row_growth=config.train.row_growth,
    )
    derived = built.derived | {"train.precision": precision.name, "train.device": str(device)}
    return Prepared(setup, derived, compiled, feeding, reference)


def plan_run(config: Config, prepared: Prepared, data: Data, began: float) -> Plan:
    """The plan, its steps measured; `began` is when the time of `train.minutes` began (`time.perf_counter()`)."""
    if data.packing is None:
        tokens = open_split(data.shards.path, "train").n_tokens
    else:
        tokens = prepared.feeding.loader().rows_per_epoch * config.data.row_tokens
    spent = time.perf_counter() - began
    return make_plan(config, prepared.setup, tokens_per_epoch=tokens, spent_s=spent, compiled=prepared.compiled)


def fit_run(
    config: Config,
    run: Run,
    data: Data,
    key: str,
    hear: OnEvent,
    should_stop: Callable[[], bool],
) -> Fitted | None:
    """Train to the last step; `None` when `should_stop()` ended it before, with a checkpoint behind it."""
    began = time.perf_counter()
    settled = dict(run.manifest().get("derived") or {})
    hear("stage", name="plan", state="begun", seconds=0.0, text="")
    prepared = prepare(config, data, run.store, settled)
    if prepared.reference is not None:
        run.record_artifact("reference", prepared.reference)
    if "train.steps" not in settled:
        plan = plan_run(config, prepared, data, began)
        settled = prepared.derived | _lengths(config, plan)
        seconds = time.perf_counter() - began
        run.record(
            derived=settled, plan=plan_facts(plan), timings=run.manifest().get("timings", {}) | {"plan": seconds}
        )
        hear("derived", values=settled)
    facts = run.manifest()["plan"]
    hear("plan", facts=facts)
    hear("stage", name="plan", state="done", seconds=time.perf_counter() - began, text="")

    began = time.perf_counter()
    setup = with_schedule(prepared.setup, config, settled["train.steps"])
    resumed = _resume(run, setup, key, hear)
    state = resumed or TrainState(derived=settled)
    run.record(attempts=run.manifest()["attempts"] + 1, status="running")
    hear("started", attempt=run.manifest()["attempts"], resumed_from=state.step if resumed else None)
    hear("stage", name="train", state="begun", seconds=0.0, text="")
    hooks = _hooks(config, run, prepared.feeding, setup, state, key, hear)
    fit(setup, state, hooks, should_stop)
    finished = state.step == setup.steps
    if not finished:
        _save(run, setup, state, key, hear)
    words = f"{state.step:,} of {setup.steps:,} steps, {state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s"
    elapsed = time.perf_counter() - began
    hear("stage", name="train", state="done" if finished else "stopped", seconds=elapsed, text=words)
    timings = run.manifest().get("timings", {})
    run.record(timings=timings | {"train": timings.get("train", 0.0) + elapsed})
    return Fitted(setup, state, settled) if finished else None


def _resume(run: Run, setup: Setup, key: str, hear: OnEvent) -> TrainState | None:
    """Go on from the newest checkpoint that is whole; a corrupt one is told, and the one before it taken."""
    checkpoints = list_checkpoints(run.checkpoints)
    for folder in reversed(checkpoints):
        try:
            state, position = load_checkpoint(folder, setup.model, setup.optimizer, key)
        except StoreError as problem:
            if folder == checkpoints[0]:
                raise
            hear("warning", text=f"{' '.join(str(problem).split())} The checkpoint before it is taken.")
            disown_checkpoint(folder)
            continue
        setup.loader.load_state(position)
        return state
    return None


def save_fitted(fitted: Fitted, tokenizer: Artifact, folder: Path) -> dict[str, Any]:
    """Write the trained model into `folder`; returns the facts for its manifest."""
    with fitted.setup.optimizer.averaged():
        save_model(fitted.setup.model, load_tokenizer(tokenizer.path, _longest(fitted)), folder)
    state = fitted.state
    return {
        "n_params": sum(parameter.numel() for parameter in fitted.setup.model.parameters()),
        "steps": state.step,
        "tokens": state.tokens,
        "targets": state.targets,
        "skipped_steps": state.skipped,
        "train_seconds": state.seconds,
        "best_heldout_loss": state.best_loss,
        "best_step": state.best_step,
        "derived": fitted.derived,
    }


def _longest(fitted: Fitted) -> int | None:
    """Longest sequence that the model declares, or `None` for a module that declares none."""
    from transformers import PreTrainedModel

    model = fitted.setup.model
    declared = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    return int(declared["max_position_embeddings"]) if "max_position_embeddings" in declared else None


def _lengths(config: Config, plan: Plan) -> dict[str, int]:
    part = max(1, plan.steps // _TIMES_A_RUN)
    unsaved = max(1, int(_LONGEST_UNSAVED_S / plan.step_seconds))
    return {
        "train.steps": plan.steps,
        "train.eval_every": config.train.eval_every or part,
        "train.save_every": config.train.save_every or min(part, unsaved),
    }


def _compile(config: Config, model: nn.Module, device: torch.device) -> str:
    """Compile where the config and the machine say so; returns what was done and why, in words."""
    train = config.train
    if train.compile == "off":
        return "no: set in the config"
    problem = compiler_problem(device)
    if problem is not None:
        return f"no: {problem}"
    is_short = (train.minutes or _COMPILE_PAYS_MINUTES) < _COMPILE_PAYS_MINUTES or (
        train.steps or _COMPILE_PAYS_STEPS
    ) < _COMPILE_PAYS_STEPS
    if train.compile == "auto" and is_short:
        return "no: the run is too short to repay it"
    return f"yes: {compile_blocks(model)} blocks"


def _recompute_activations(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    from kajiya.errors import ConfigError

    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ConfigError("train.gradient_checkpointing", f"{type(model).__name__} does not support it")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _hooks(
    config: Config, run: Run, feeding: Feeding, setup: Setup, state: TrainState, key: str, hear: OnEvent
) -> list[Hook]:
    kept = list(feeding.heldout(config.train.eval_rows))

    def progress(report: StepReport) -> None:
        hear("progress", stage="train", done=report.state.step, total=setup.steps, unit="steps")

    speed = _Speed(state)

    def log(report: StepReport) -> None:
        values = drain_window(report.state) | {
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "train/tokens": report.state.tokens,
            "train/skipped": report.state.skipped,
            "train/tokens_per_second": speed(report.state),
            "train/data_wait_s": setup.loader.waited_s,
        }
        hear("metrics", step=report.state.step, values=values)

    def evaluate(report: StepReport) -> None:
        with setup.optimizer.averaged():
            values = heldout_values(config.train.loss.name, setup, kept)
        loss = next(iter(values.values()))
        hear("metrics", step=report.state.step, values=values)
        if math.isfinite(loss) and (report.state.best_loss is None or loss < report.state.best_loss):
            report.state.best_loss, report.state.best_step = loss, report.state.step
            save(report)

    def save(report: StepReport) -> None:
        _save(run, setup, report.state, key, hear)
        prune_checkpoints(run.checkpoints, config.train.keep_last, report.state.best_step)

    return [
        Hook("progress", 1, progress),
        Hook("log", config.train.log_every, log),
        Hook("evaluate", state.derived["train.eval_every"], evaluate),
        Hook("save", state.derived["train.save_every"], save),
    ]


class _Speed:
    """Tokens per second since the last call."""

    def __init__(self, state: TrainState) -> None:
        self._tokens = state.tokens
        self._seconds = state.seconds

    def __call__(self, state: TrainState) -> float:
        tokens = state.tokens - self._tokens
        seconds = state.seconds - self._seconds
        self._tokens, self._seconds = state.tokens, state.seconds
        return tokens / seconds


def _save(run: Run, setup: Setup, state: TrainState, key: str, hear: OnEvent) -> None:
    if any(folder.name == checkpoint_name(state.step) for folder in list_checkpoints(run.checkpoints)):
        return
    folder = save_checkpoint(run.checkpoints, state, setup.model, setup.optimizer, setup.loader.state(), key)
    size = sum(path.stat().st_size for path in folder.iterdir())
    hear("checkpoint", step=state.step, path=str(folder.relative_to(run.folder)), bytes=size)


def plan_only(config: Config, data: Data, store: Store) -> tuple[Plan, dict[str, Any]]:
    """The plan of a config without a run, and the values that were derived."""
    began = time.perf_counter()
    prepared = prepare(config, data, store, {})
    plan = plan_run(config, prepared, data, began)
    return plan, prepared.derived | _lengths(config, plan)
