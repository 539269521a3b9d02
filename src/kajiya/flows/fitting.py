"""The training of one run: set up, measure, go on from the last checkpoint, fit with its hooks, save."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.data.bigrams import Bigrams, count_bigrams
from kajiya.data.progress import OnEvent, silent
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.flows.feeding import (
    Data,
    Feeds,
    build_reference,
    has_many_lengths,
    open_feeding,
    require_isolation,
    task_of,
)
from kajiya.flows.fit_hooks import follower_hooks, make_hooks
from kajiya.flows.keeping import Keeper
from kajiya.flows.planning import plan_run
from kajiya.flows.prove import prove_run
from kajiya.flows.rolling import open_rollouts
from kajiya.flows.sample_watch import open_samples
from kajiya.flows.task_watch import open_watch
from kajiya.flows.teaching import load_run_loss
from kajiya.models.adapt import has_adapter, rate_ratios, trains_tokens, transform
from kajiya.models.bigram_init import begin_from_bigrams
from kajiya.models.build import BuiltModel, build_model, vocabulary_of
from kajiya.models.experts import left_out
from kajiya.models.fused import fuse_blocks
from kajiya.models.future import add_future_heads, without_future_heads
from kajiya.models.induction_init import begin_with_induction
from kajiya.models.isolation import packed_words
from kajiya.models.outputs import decoder_start
from kajiya.models.quantized import count_params
from kajiya.models.size import missed_words
from kajiya.models.trained import save_trained
from kajiya.preflight.plan import Plan, plan_facts, with_schedule
from kajiya.run.folder import Run
from kajiya.run.process import collect_as_usual, import_transformers, use_gpu
from kajiya.run.store import Artifact, Store
from kajiya.training.compile import compile_where_it_pays, takes_whole_blocks
from kajiya.training.cross_entropy import settle_softmax
from kajiya.training.fit import Setup, fit
from kajiya.training.flops import matmul_peak
from kajiya.training.guard import Guard
from kajiya.training.histograms import histograms_watch
from kajiya.training.layer_norms import norms_watch
from kajiya.training.losses import load_measure
from kajiya.training.memory import largest_micro_batch
from kajiya.training.optimizers import load_optimizer, require_other_memory
from kajiya.training.portions import AUTO, Portions, rows_of_step, share_out
from kajiya.training.precision import PRECISIONS, Precision, require_tf32, resolve_device, resolve_precision
from kajiya.training.ranks import Ranks, agreed, find_ranks, join, wait_for_all
from kajiya.training.recompute import recompute_activations
from kajiya.training.saving import CheckpointWriter
from kajiya.training.state import TrainState
from kajiya.training.stopping import is_stale
from kajiya.training.strategy import SingleProcess, open_strategy
from kajiya.training.timing import time_words

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
    ranks: Ranks
    feeding: Feeds
    computed: dict[str, Artifact]
    """What the loss compares with, computed once: a reference, or what is kept of a teacher."""


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
    ranks = find_ranks(config.train.strategy)
    device = resolve_device(config.train.device, "train.device", ranks.local)
    require_tf32(config.train.fp32_matmul, device)
    use_gpu(device)
    join(ranks, device)
    import_transformers()
    collect_as_usual()
    precision = _resolve_precision(config, settled, device, ranks)
    built = _build(config, data)
    require_isolation(config, data.corpus.facts["format"], built.module)
    adapted = add_future_heads(built.module, config.model.future_heads)
    adapted |= transform(built.module, config.adapter, config.model.quantize, config.seed, _encoder(data))
    if has_adapter(built.module) and config.model.path and data.tokenizer.facts["added_tokens"]:
        _require_rows_of_tokens(built.module)
    recompute_activations(built.module, config.train.gradient_checkpointing, device)
    require_other_memory(config.optim, device)
    strategy = open_strategy(device, precision, ranks)
    model = strategy.prepare(built.module)
    fused = (
        "no: the compiler takes the blocks as Transformers has them"
        if takes_whole_blocks(config.train, model, device)
        else fuse_blocks(model, precision.weights, device, is_autocast=precision.autocast is not None)
    )
    compiled = compile_where_it_pays(
        config.train, model, device, fused, varies=has_many_lengths(config, data.corpus.facts["format"])
    )
    compiled += packed_words(model, device, precision.autocast or precision.weights)
    softmax = settle_softmax(
        model, device, precision.autocast or precision.weights, ranks, settled.get("train.softmax")
    )
    compiled += "" if softmax is None else f"; the loss's softmax by {softmax.words}"
    if not ranks.is_first:
        wait_for_all(ranks)  # the first computes the reference and what is kept of a teacher, the others find it
    made = build_reference(config, data, model, precision, store)
    loss, teacher = load_run_loss(config, data, device, store)
    if ranks.is_first:
        wait_for_all(ranks)
    reference = None if made is None else made[0]
    feeding: Feeds
    if loss_row(config.train.loss.name).takes == "prompts":
        feeding = open_rollouts(config, data, model, precision, device)
    else:
        feeding = open_feeding(config, data, reference, start_id=decoder_start(model), device=device)
    loader = feeding.loader(batch=1, rank=ranks.rank, world=ranks.n)
    setup = Setup(
        model=model,
        loss=loss,
        measure=load_measure(config.train.loss),
        loader=loader,
        optimizer=load_optimizer(config.optim, model, config.train.ema_decay, rate_ratios(model, config.adapter)),
        strategy=strategy,
        precision=precision,
        lr=lambda _step: config.optim.lr,
        steps=1,
        accumulate=1,
        clip_norm=config.optim.clip_norm,
        max_skipped=config.optim.max_skipped,
        row_growth=config.train.row_growth,
    )
    portions = _share_out(config, setup, loader, ranks, settled)
    setup = replace(setup, accumulate=portions.accumulate, guard=Guard(shrink=shrinker(loader, portions)))
    derived = (
        built.derived
        | adapted
        | {
            "train.precision": precision.name,
            "train.device": str(device),
            "train.micro_batch": portions.micro_batch,
        }
        | ({} if softmax is None else {"train.softmax": softmax.way})
    )
    computed = {name: each for name, each in (("reference", reference), ("teacher_kept", teacher)) if each is not None}
    return Prepared(setup, derived, compiled, ranks, feeding, computed)


def _resolve_precision(config: Config, settled: dict[str, Any], device: torch.device, ranks: Ranks) -> Precision:
    """The run's precision; what `auto` picked at its beginning is kept, and every rank takes the first one's pick."""
    kept = settled.get("train.precision")
    if kept is not None and config.train.precision == AUTO:
        return replace(resolve_precision(kept, device), reason="auto picked it when the run began")
    precision = resolve_precision(config.train.precision, device)
    name = agreed(ranks, precision.name, PRECISIONS)
    return (
        precision
        if name == precision.name
        else replace(resolve_precision(name, device), reason="the first rank's pick")
    )


def _share_out(config: Config, setup: Setup, loader: Any, ranks: Ranks, settled: dict[str, Any]) -> Portions:
    """This rank's part of a step, and the loader's batches of that size; the micro-batch found by measuring where it is auto."""
    rows = rows_of_step(config.train)
    wanted = settled.get("train.micro_batch", config.train.micro_batch)
    if wanted == AUTO:
        wanted = largest_micro_batch(
            setup, lambda n: setattr(loader, "batch", n), share_out(rows, rows, ranks.n).micro_batch
        )
    portions = share_out(rows, int(wanted), ranks.n)
    loader.batch = portions.micro_batch
    return portions


def _require_rows_of_tokens(module: Any) -> None:
    """Raise `ConfigError` for an adapter that would not bring along what it needs of tokens that its base does not have."""
    if not trains_tokens(module):
        raise ConfigError(
            "tokenizer",
            "adds tokens, and the adapter leaves the embedding or the output head, where they have rows, as they are",
            "Set adapter.options.train_embeddings=true and adapter.options.train_head=true, which lora and dora have, or train "
            "the whole model on the tokens first.",
        )


def shrinker(loader: Any, portions: Portions) -> Callable[[int], int]:
    """Makes the loader's batches smaller: each step takes the largest divisor of the config's that is at most half of the last."""
    sizes = [portions.micro_batch]
    while sizes[-1] > 1:
        sizes.append(max(n for n in range(1, sizes[-1] // 2 + 1) if portions.micro_batch % n == 0))

    def shrink(times: int) -> int:
        if times >= len(sizes):
            return 0
        loader.batch = sizes[times]
        return portions.micro_batch // sizes[times]

    return shrink


def _build(config: Config, data: Data) -> BuiltModel:
    """The model as it is before anything is trained, in float32 on the CPU."""
    vocabulary = load_tokenizer(data.tokenizer.path)
    known = vocabulary_of(vocabulary, data.tokenizer.facts["added_tokens"])
    built = build_model(config.model, known, config.seed, task_of(config, data.corpus))
    if config.model.init in _BEGINNINGS:
        _BEGINNINGS[config.model.init](built.module, count_bigrams(data.shards.path, len(vocabulary)), config.seed)
    return built


def _encoder(data: Data) -> Callable[[str], list[int]]:
    return lambda text: load_tokenizer(data.tokenizer.path).encode(text, add_special_tokens=False)


def _plan(config: Config, prepared: Prepared, data: Data, began: float, store: Store | None) -> Plan:
    """The plan. Processes that work together measure their steps together, so that nothing kept is taken then."""
    kept = store if prepared.ranks.n == 1 else None
    plan = plan_run(config, prepared.setup, prepared.feeding, data, compiled=prepared.compiled, began=began, store=kept)
    said = [missed_words(config.model, prepared.derived["model.n_params"])]
    if config.model.quantize != "none" or config.adapter.name not in ("prefix", "prompt"):
        said.append(left_out(prepared.setup.model))
    return replace(plan, size_note="; ".join(filter(None, said)))


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
    module = prepared.setup.model
    watch = open_watch(config, data.corpus, lambda folder: _save(config, module, data, folder), run.folder)
    samples = open_samples(config, prepared.feeding, lambda folder: _save(config, module, data, folder), run.folder)
    for name, artifact in prepared.computed.items():
        run.record_artifact(name, artifact)
    if "train.steps" not in settled:
        plan = _plan(config, prepared, data, began, run.store)
        settled = _settle(config, prepared, plan)
        seconds = time.perf_counter() - began
        run.record(
            derived=settled, plan=plan_facts(plan), timings=run.manifest().get("timings", {}) | {"plan": seconds}
        )
        hear("derived", values=settled)
    facts = run.manifest()["plan"]
    hear("plan", facts=facts)
    hear("stage", name="plan", state="done", seconds=time.perf_counter() - began, text="")

    _prove_first(config, run, prepared, data, settled, hear)
    began = time.perf_counter()
    keeper = _keeper(config, run, prepared, settled, key, hear)
    setup = keeper.setup
    resumed = keeper.resume()
    state = resumed or TrainState(derived=settled)
    run.record(attempts=run.manifest()["attempts"] + 1, status="running")
    hear("started", attempt=run.manifest()["attempts"], resumed_from=state.step if resumed else None)
    hear("stage", name="train", state="begun", seconds=0.0, text="")
    hooks = make_hooks(
        config,
        prepared.feeding,
        keeper,
        state,
        hear,
        compiled=prepared.compiled.startswith("yes"),
        watch=watch,
        samples=samples,
    )
    try:
        fit(setup, state, hooks, lambda: should_stop() or is_stale(config.train, state))
        finished = _is_finished(config, setup, state)
        if not finished:
            keeper.save(state)
    finally:
        keeper.finish()
    if not finished:
        keeper.require_saved(state.step)
    if finished and config.train.final == "best" and state.best_step is not None:
        keeper.take(state.best_step)
    elapsed = time.perf_counter() - began
    time_facts = _time_facts(setup, state, facts)
    words = _fit_words(setup, state, time_facts)
    hear("stage", name="train", state="done" if finished else "stopped", seconds=elapsed, text=words)
    timings = run.manifest().get("timings", {})
    run.record(timings=timings | {"train": timings.get("train", 0.0) + elapsed}, time=time_facts)
    return Fitted(setup, state, settled) if finished else None


def _prove_first(
    config: Config, run: Run, prepared: Prepared, data: Data, settled: dict[str, Any], hear: OnEvent
) -> None:
    """Prove the run on the first rank, by itself, while the others wait for the word whether they go on."""
    setup = with_schedule(prepared.setup, config, settled["train.steps"])
    if prepared.ranks.n > 1:
        setup = replace(setup, strategy=SingleProcess(setup.strategy.device, setup.precision))
    is_proven = False
    try:
        plan, rebuild = run.manifest()["plan"], lambda: _build(config, data).module
        proof = prove_run(config, setup, data, run.store, plan, rebuild, _recording(run, hear))
        run.record_artifact("proof", proof)
        run.record(timings=run.manifest().get("timings", {}) | {"prove": proof.facts["seconds"]})
        is_proven = True
    finally:
        prepared.setup.strategy.from_first(float(is_proven))


def follow_run(config: Config, run: Run, data: Data, key: str, should_stop: Callable[[], bool]) -> None:
    """The part of a rank that is not the first: the same steps on other rows; it writes and tells nothing."""
    began = time.perf_counter()
    settled = dict(run.manifest().get("derived") or {})
    prepared = prepare(config, data, run.store, settled)
    if "train.steps" not in settled:
        settled = _settle(config, prepared, _plan(config, prepared, data, began, None))
    if not prepared.setup.strategy.from_first(0.0):
        return  # the first rank proved that the run would go wrong, and says so
    keeper = _keeper(config, run, prepared, settled, key, silent)
    state = keeper.resume() or TrainState(derived=settled)
    fit(keeper.setup, state, follower_hooks(keeper, state), should_stop)
    if not _is_finished(config, keeper.setup, state):
        keeper.save(state)


def _is_finished(config: Config, setup: Setup, state: TrainState) -> bool:
    """Whether the training came to its end, by the first rank, which alone knows the evaluations."""
    return bool(setup.strategy.from_first(float(state.step == setup.steps or is_stale(config.train, state))))


def _keeper(config: Config, run: Run, prepared: Prepared, settled: dict[str, Any], key: str, hear: OnEvent) -> Keeper:
    """The checkpoints of the run, and the setup with its schedule and with what a step that goes wrong does."""
    train = config.train
    setup = with_schedule(prepared.setup, config, settled["train.steps"])
    guard = replace(
        setup.guard,
        faults=run.folder / "faults" / (f"rank-{prepared.ranks.rank}" if prepared.ranks.n > 1 else ""),
        tell=lambda text: hear("warning", text=text),
        spike_sigmas=train.spike_sigmas,
        on_spike=train.on_spike,
        rollback=lambda _state: keeper.go_back(settled["train.save_every"]),
    )
    writer = CheckpointWriter(run.checkpoints, train.keep_last, settled["train.save_every"])
    watches = (norms_watch(train.layer_norms_every, hear), histograms_watch(train.histograms_every, hear))
    setup = replace(setup, guard=guard, watches=tuple(each for each in watches if each is not None))
    keeper = Keeper(run, setup, key, hear, writer, prepared.ranks)
    return keeper


def _settle(config: Config, prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """Every derived value; the lengths are the first rank's."""
    agree = prepared.setup.strategy.from_first
    return prepared.derived | {name: int(agree(value)) for name, value in _lengths(config, plan).items()}


def _time_facts(setup: Setup, state: TrainState, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Where the time went, and how much of the machine's matrix products the model's own were."""
    peak = matmul_peak(setup.strategy.device, setup.precision)
    rate = state.tokens / max(state.seconds, 1e-9)
    return {
        "spent_s": state.spent,
        "tokens_per_second": rate,
        "matmul_peak_flops": peak,
        "model_flops_utilization": rate * plan["flops_per_token"] / (peak * plan["n_ranks"]),
    }


def _fit_words(setup: Setup, state: TrainState, facts: Mapping[str, Any]) -> str:
    done = f"{state.step:,} of {setup.steps:,} steps, {facts['tokens_per_second']:,.0f} tokens/s"
    used = f"{facts['model_flops_utilization']:.0%} of {facts['matmul_peak_flops'] / 1e9:,.0f} GFLOP/s"
    return f"{done}, {used}; {time_words(facts['spent_s'])}"


def _recording(run: Run, hear: OnEvent) -> OnEvent:
    """Hears a proof into the run's manifest, a failed one too."""

    def listen(kind: str, **fields: Any) -> None:
        if kind == "proof":
            run.record(proof=fields["facts"])
        hear(kind, **fields)

    return listen


def save_fitted(config: Config, fitted: Fitted, data: Data, folder: Path) -> dict[str, Any]:
    """Write the trained model, or the adapter, into `folder`; returns the facts for its manifest."""
    module = fitted.setup.model
    with fitted.setup.optimizer.averaged(), without_future_heads(module):
        facts = _save(config, module, data, folder)
        facts |= {"n_params": count_params(module), "n_trainable": count_params(module, trainable=True)}
    state = fitted.state
    return facts | {
        "steps": state.step,
        "tokens": state.tokens,
        "targets": state.targets,
        "skipped_steps": state.skipped,
        "train_seconds": state.seconds,
        "best_heldout_loss": state.best_loss,
        "best_step": state.best_step,
        "derived": fitted.derived,
    }


def _save(config: Config, module: Any, data: Data, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(data.tokenizer.path, _longest(module))
    with without_future_heads(module):
        rebuild, n_added = lambda: _build(config, data).module, int(data.tokenizer.facts["added_tokens"])
        return save_trained(config.model, module, tokenizer, folder, rebuild, n_added)


def _longest(model: Any) -> int | None:
    """Longest sequence that the model declares, or `None` for a module that declares none."""
    from transformers import PreTrainedModel

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


def plan_only(config: Config, data: Data, store: Store) -> tuple[Plan, dict[str, Any]]:
    """The plan of a config without a run, and the values that were derived."""
    began = time.perf_counter()
    prepared = prepare(config, data, store, {})
    plan = _plan(config, prepared, data, began, None)
    return plan, prepared.derived | _lengths(config, plan)


def prove_only(config: Config, data: Data, store: Store, hear: OnEvent) -> dict[str, Any]:
    """The verdict of a config without a run. Raises `ProofError` for checks that fail."""
    began = time.perf_counter()
    prepared = prepare(config, data, store, {})
    plan = _plan(config, prepared, data, began, store)
    hear("plan", facts=plan_facts(plan))
    setup = with_schedule(prepared.setup, config, plan.steps)
    proof = prove_run(config, setup, data, store, plan_facts(plan), lambda: _build(config, data).module, hear)
    return dict(proof.facts)
