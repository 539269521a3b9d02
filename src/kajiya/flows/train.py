"""From a config to a trained, evaluated, documented model: data, plan, fit, save, evaluate, report; each result an artifact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kajiya.config.rewards import require_readable
from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.config.validate import require_format
from kajiya.data.progress import OnEvent, silent
from kajiya.errors import MissingExtraError
from kajiya.flows.balance import balance_words
from kajiya.flows.bases import find_bases, loss_without_place, without_places
from kajiya.flows.feeding import Data, answer_tokens, packing_of, rendering_of
from kajiya.flows.fitting import fit_run, follow_run, save_fitted
from kajiya.flows.own_module import own_names
from kajiya.flows.report import write_report
from kajiya.flows.stage_words import (
    baseline_words,
    corpus_words,
    evaluation_words,
    figures_words,
    model_words,
    packing_words,
    shards_words,
    tokenizer_words,
)
from kajiya.flows.stages import Stages
from kajiya.flows.stopping import stop_on_signals
from kajiya.models.build import check_architecture
from kajiya.run.alive import BEAT, Beat
from kajiya.run.code import code_revision, own_code
from kajiya.run.folder import Run, find_run, open_run, run_name
from kajiya.run.gpu_energy import gpu_names, read_energy
from kajiya.run.inspect import moved_words
from kajiya.run.process import set_up_process
from kajiya.run.store import Artifact, Store, artifact_key, open_artifact, produce
from kajiya.run.trackers.dispatch import Trackers, start_trackers
from kajiya.run.usage import forget_notes, note_usage, noted_usage, usage_with, with_others
from kajiya.training.precision import resolve_device
from kajiya.training.ranks import Ranks, find_ranks, join, leave, wait_for_all


@dataclass(frozen=True)
class Trained:
    """What a training flow leaves: its run, and the model unless it was interrupted."""

    run: Run
    model: Artifact | None
    report: Path | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scope:
    """How much of the flow is wanted: a trial of a study needs neither baselines and samples nor a report."""

    is_evaluated: bool = True
    is_reported: bool = True
    threads: int | None = None
    """Threads of torch; `None`: one for each usable core."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the run's manifest says of where it belongs."""


_WHOLE = Scope()
_PATIENCE_S = 10.0
"""Longest wait for what the other ranks note of their use, when their steps are over."""


def train(
    config: Config,
    store: Store,
    *,
    command: Sequence[str] = (),
    on_event: OnEvent = silent,
    scope: Scope = _WHOLE,
) -> Trained:
    """Everything from the rows to the report. Run again with the same config, it goes on where it was, or reuses what is done.

    `on_event(kind, **fields)` hears what the event log hears, and `progress` events besides.
    SIGTERM and SIGINT end the training after the step at hand, with a checkpoint. Elsewhere SIGINT raises `KeyboardInterrupt`,
    and SIGTERM does where the caller has made it (`sigterm_as_interrupt`): what is finished by then is kept.
    """
    ranks = find_ranks(config.train.strategy)
    if not ranks.is_first:
        return _follow(config, store, ranks)
    process = set_up_process(
        config.seed, store.root, config.train.deterministic, scope.threads, config.train.fp32_matmul
    )
    early: list[tuple[str, dict[str, Any]]] = []

    def hear_early(kind: str, **fields: Any) -> None:
        on_event(kind, **fields)
        if kind != "progress":
            early.append((kind, fields))

    stages = Stages(hear_early)
    based = find_bases(config, store, hear_early)
    config = based.config
    data = replace(prepare_data(config, store, stages), bases=based.parents)
    key = training_key(config, data)
    # A key to the server is no business of manifests, logs and trackers.
    run = open_run(store, replace(config, serve=replace(config.serve, api_key=None)), key, list(command), process)
    beat = Beat(run.folder / BEAT).start()
    on_event("run", id=run.id)
    for kind, fields in early:
        run.events.emit(kind, **fields)

    def hear(kind: str, **fields: Any) -> None:
        on_event(kind, **fields)
        if kind != "progress":
            run.events.emit(kind, **fields)

    @cache
    def trackers() -> Trackers:
        """They read the log from its beginning, so that they may begin late: behind the plan, whose steps they would slow."""
        return start_trackers(run, config.track)

    def hear_and_watch(kind: str, **fields: Any) -> None:
        hear(kind, **fields)
        if kind == "plan":
            trackers()
        if kind == "metrics":
            for text in trackers().poll():
                on_event("warning", text=text)

    stages.on_event = hear_and_watch
    store = store.heard_by(hear_and_watch)
    used, gpus = run.manifest().get("usage"), dict[str, int | None]()
    forget_notes(run.folder)

    def usage(patience_s: float) -> dict[str, Any]:
        """Of all attempts and ranks so far."""
        others = noted_usage(run.folder, ranks.n - 1, patience_s)
        total = {"n_uncounted_ranks": 0} | with_others(usage_with(used, gpus), others)
        return total | {"n_uncounted_ranks": total["n_uncounted_ranks"] + ranks.n - 1 - len(others)}

    status = "failed"
    error: str | None = None
    model: Artifact | None = None
    report: Path | None = None
    try:
        meet(ranks, config)
        device = resolve_device(config.train.device, "train.device", ranks.local)
        gpus = _energy_of(device)
        can_report = scope.is_reported and _can_report(hear)
        run.record(ledger=next(fields["facts"] for kind, fields in early if kind == "ledger"))
        run.record(command=list(command) or run.manifest()["command"], **scope.facts)
        for name, artifact in data.artifacts().items():
            run.record_artifact(name, artifact)
        model = _model(config, store, run, data, key, stages, hear_and_watch)
        if model is not None:
            if scope.is_evaluated:
                _evaluation(config, store, run, data, model, stages)
            timings = run.manifest().get("timings", {}) | stages.timings
            run.record(timings=timings, status="finished", usage=usage(_PATIENCE_S))
            if can_report:
                report = stages.produce("report", lambda: (write_report([run], run.folder / "report"), False), str)
                hear("report", path=str(report))
        status = "finished" if model is not None else "interrupted"
    except BaseException as problem:
        status = "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed"
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        timings = run.manifest().get("timings", {}) | stages.timings
        run.record(status=status, timings=timings, usage=usage(_PATIENCE_S if error is None else 0.0))
        followers = trackers()
        run.events.emit("ended", status=status, error=error)
        warnings = followers.finish()
        beat.stop()
    return Trained(run, model, report, tuple(warnings))


def _energy_of(device: torch.device) -> dict[str, int | None]:
    """The counter of the GPU that this process computes on; none of a CPU."""
    return read_energy(gpu_names([device.index or 0] if device.type == "cuda" else []))


def meet(ranks: Ranks, config: Config) -> None:
    """Of several processes: the first has prepared the data and opened the run, and all go on together."""
    join(ranks, resolve_device(config.train.device, "train.device", ranks.local))
    wait_for_all(ranks)


def _follow(config: Config, store: Store, ranks: Ranks) -> Trained:
    """The part of a process that is not the first: nothing but its share of the steps."""
    set_up_process(
        config.seed + ranks.rank, store.root, config.train.deterministic, fp32_matmul=config.train.fp32_matmul
    )
    meet(ranks, config)
    based = find_bases(config, store, silent)
    config = based.config
    data = replace(prepare_data(config, store, Stages(silent)), bases=based.parents)
    key = training_key(config, data)
    run = find_run(store, run_name(config.name, key))
    gpus = _energy_of(resolve_device(config.train.device, "train.device", ranks.local))
    try:
        if store.find("model", key) is None:
            with stop_on_signals() as stop:
                follow_run(config, run, data, key, stop)
    finally:
        note_usage(run.folder, ranks.rank, gpus)
    leave()
    return Trained(run, None, None)


def _can_report(hear: OnEvent) -> bool:
    """Whether the report's packages are there; told before the first step where they are not, never after the last."""
    from kajiya.flows.figure_files import require_figures

    try:
        require_figures()
    except MissingExtraError as problem:
        hear("warning", text=f"no report will be written: {problem}")
        return False
    return True


def prepare_data(config: Config, store: Store, stages: Stages) -> Data:
    """Corpus, tokenizer and shards of the config, made or found. Raises `ConfigError` first for an unknown architecture."""
    from kajiya.data.corpus import build_corpus
    from kajiya.data.effects import require_effect
    from kajiya.data.ledger import data_ledger, ledger_words, require_kept
    from kajiya.data.pack import build_packing
    from kajiya.data.shards import build_shards
    from kajiya.data.tokenizer import build_tokenizer

    check_architecture(config.model)
    tell = stages.on_event
    store = store.heard_by(tell)
    corpus = stages.produce("corpus", lambda: build_corpus(config.data, store, tell), corpus_words)
    require_kept(data_ledger(corpus.facts), config.data.max_lost_fraction)
    require_format(config.train.loss.name, corpus.facts["format"], "data.format")
    if loss_row(config.train.loss.name).takes == "prompts":
        require_readable(config, corpus.facts["format"])
    chosen = packing_of(config, corpus.facts["format"])
    require_effect(config.data, corpus.facts["format"], chosen.name)
    tokenizer = stages.produce(
        "tokenizer",
        lambda: build_tokenizer(config.tokenizer, corpus, store, tell, config.data.render, config.data.memory_mib),
        tokenizer_words,
    )
    rendering = rendering_of(config, corpus, tokenizer)
    shards = stages.produce(
        "shards", lambda: build_shards(config.data, corpus, tokenizer, store, tell, rendering), shards_words
    )
    unbalanced = balance_words(config.train.loss, shards.path)
    if unbalanced is not None:
        tell("warning", text=unbalanced)
    packing = None
    if chosen.name != "concatenate":
        packing = stages.produce(
            "packing",
            lambda: build_packing(config.data, shards, store, answer_tokens(config)),
            lambda made: f"{packing_words(made)}; {chosen.name}: {chosen.why}",
        )
    ledger = data_ledger(corpus.facts, shards.facts, None if packing is None else packing.facts)
    require_kept(ledger, config.data.max_lost_fraction)
    tell("ledger", text=ledger_words(ledger), facts=ledger.facts())
    return Data(corpus, tokenizer, shards, packing)


def training_key(config: Config, data: Data) -> str:
    """Key of the model that this config would train on these data."""
    return artifact_key("model", _training_code(), _training_section(config), data.parents())


def _training_code() -> str:
    return code_revision("kajiya.training.fit", "kajiya.flows.fitting", "kajiya.models.build", "kajiya.models.save")


def _training_section(config: Config) -> dict[str, Any]:
    """The settings that training reads."""
    return {
        "name": config.name,
        "seed": config.seed,
        "optim": config.optim,
        "schedule": config.schedule,
        "train": replace(config.train, loss=loss_without_place(config.train.loss)),
        "row_tokens": config.data.row_tokens,
        "isolate": config.data.isolate,
        "own_code": own_code(own_names(config)),
    } | without_places(config)


def _model(
    config: Config, store: Store, run: Run, data: Data, key: str, stages: Stages, hear: OnEvent
) -> Artifact | None:
    """The trained model: found in the store, or made; `None` when a signal ended the training before its last step."""
    found = store.find("model", key)
    if found is None:
        _tell_moved(run, hear)
        with stop_on_signals() as stop:
            fitted = fit_run(config, run, data, key, hear, stop)
        if fitted is None:
            return None
        made, _ = produce(
            store,
            "model",
            code=_training_code(),
            config=_training_section(config),
            parents=data.parents(),
            make=lambda folder: save_fitted(config, fitted, data, folder),
        )
    else:
        made = stages.produce("train", lambda: (found, True), model_words)
    run.record_artifact("model", made)
    return made


def _tell_moved(run: Run, hear: OnEvent) -> None:
    """A run that goes on elsewhere is not promised to come out the same to the bit."""
    words = moved_words(run.manifest())
    if words:
        hear("warning", text=f"the run goes on with other software or on another machine than it began: {words}")


def _evaluation(config: Config, store: Store, run: Run, data: Data, model: Artifact, stages: Stages) -> None:
    from kajiya.evals.evaluate import evaluate_model, measure_baselines
    from kajiya.flows.kind_evaluation import evaluate_kind, is_judged_by_bits
    from kajiya.flows.own_module import rebuild_own_module

    step = model.facts["steps"]
    if not is_judged_by_bits(config, data.corpus):
        listed = run.manifest()["artifacts"]
        reference = open_artifact(store.root / listed["reference"]["path"]) if "reference" in listed else None
        judged = stages.produce(
            "evaluation", lambda: evaluate_kind(config, model, data, reference, store), figures_words
        )
        run.record_artifact("evaluation", judged)
        known = {name: row["value"] for name, row in judged.facts["figures"].items() if row["value"] is not None}
        values = {f"test/{name}": value for name, value in known.items()}
        run.events.emit("metrics", step=step, values=values)
        return
    baselines = stages.produce(
        "baselines", lambda: measure_baselines(config.eval.baselines, data.corpus, store), baseline_words
    )
    run.record_artifact("baselines", baselines)
    evaluation = stages.produce(
        "evaluation",
        lambda: evaluate_model(
            config.eval,
            model,
            data.corpus,
            store,
            context_tokens=config.data.row_tokens,
            seed=config.seed,
            module=rebuild_own_module(config, model, data.tokenizer),
        ),
        evaluation_words,
    )
    run.record_artifact("evaluation", evaluation)
    figures = {name: evaluation.facts[name] for name in ("bits_per_byte", "perplexity")}
    run.events.emit("metrics", step=step, values={f"test/{name}": value for name, value in figures.items()})
