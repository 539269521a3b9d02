"""Evaluate any model: one that writes text on the held-out text of a recipe, any other on the held-out rows of its run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kajiya.config.compose import compose, from_plain, recompose
from kajiya.config.schema import Config
from kajiya.data.corpus import build_corpus
from kajiya.data.progress import OnEvent, silent
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.evaluate import evaluate_model, measure_baselines
from kajiya.evals.evaluate_endpoint import evaluate_endpoint
from kajiya.flows.feeding import Data
from kajiya.flows.kind_evaluation import evaluate_kind, is_judged_by_bits
from kajiya.flows.own_module import rebuild_own_module
from kajiya.flows.stage_words import baseline_words, corpus_words, evaluation_words, figures_words
from kajiya.flows.stages import Stages
from kajiya.flows.targets import DEFAULT_RECIPE, Target, find_model, is_endpoint, require_text, run_of, writes_text
from kajiya.run.folder import Run
from kajiya.run.process import keep_large_blocks, quiet_torchao
from kajiya.run.store import Artifact, Store, open_artifact

_BASES = ("base", "adapter", "teacher")
"""Names under which a run lists the weights that its training started from."""


def heldout_config(
    target: str,
    recipe: str | None,
    overrides: Sequence[str],
    store: Store,
    config_dir: Path | None = None,
    *,
    for_tasks: bool = False,
) -> Config:
    """The config that says which text is held out: the recipe's, if one is named; else of a run its own; else the packaged one's.

    The packaged tasks are made of Python: `for_tasks`, a run's own config counts only where its rows are the standard library.
    """
    run = run_of(target, store) if recipe is None else None
    if run is not None:
        recorded = run.manifest()["config"]
        if not for_tasks or recorded["data"]["source"]["name"] == "stdlib":
            return recompose(recorded, overrides, config_dir)
    return compose(recipe or DEFAULT_RECIPE, overrides, config_dir)


def evaluate(
    target: str,
    config: Config,
    store: Store,
    *,
    model_name: str | None = None,
    api_key: str | None = None,
    on_event: OnEvent = silent,
) -> tuple[Artifact, Artifact | None]:
    """The evaluation of `target` (a run, an artifact, a folder, a hub name, an endpoint) and the baselines on the same bytes.

    `config` says which text, from which part is held out, and how it is scored. The model of a run that writes no text (a
    classifier, say), or that was trained on other rows than text and is asked for these, is evaluated on that run's own held-out
    rows, and has no baselines. `model_name` (`None`: the first that is served) and `api_key` are an endpoint's.
    """
    keep_large_blocks()
    quiet_torchao()
    store = store.heard_by(on_event)
    stages = Stages(on_event)
    score: Callable[[Artifact], tuple[Artifact, bool]]
    found = None if is_endpoint(target) else find_model(target, store)
    if found is None:
        score = partial(_of_endpoint, Endpoint(target, model_name, api_key), config, store)
    else:
        if found.run is not None and not writes_text(found):
            return _by_kind(found.model, found.run, store, stages), None
        require_text(found, "target")
        score = partial(_of_model, found, config, store)
    corpus = stages.produce(
        "corpus",
        lambda: _corpus(None if found is None else found.run, config, store, on_event),
        lambda made: f"{config.name}: {corpus_words(made)}",
    )
    if found is not None and found.run is not None and _is_judged_by_its_rows(found.run, corpus):
        return _by_kind(found.model, found.run, store, stages), None
    baselines = stages.produce(
        "baselines", lambda: measure_baselines(config.eval.baselines, corpus, store), baseline_words
    )
    return stages.produce("evaluation", lambda: score(corpus), evaluation_words), baselines


def _corpus(run: Run | None, config: Config, store: Store, on_event: OnEvent) -> tuple[Artifact, bool]:
    """The run's own, where the config says the same of the data, whatever has become of its sources since; else a new one."""
    manifest = {} if run is None else run.manifest()
    entry = manifest.get("artifacts", {}).get("corpus")
    if (
        entry is not None
        and (store.root / entry["path"]).is_dir()
        and from_plain(manifest["config"]).data == config.data
    ):
        return open_artifact(store.root / entry["path"]), True
    return build_corpus(config.data, store, on_event)


def _is_judged_by_its_rows(run: Run, corpus: Artifact) -> bool:
    """Whether the corpus is the run's own, and no text that bits per byte would say something of."""
    manifest = run.manifest()
    is_own = manifest["artifacts"]["corpus"]["digest"] == corpus.digest
    return is_own and not is_judged_by_bits(from_plain(manifest["config"]), corpus)


def _of_endpoint(endpoint: Endpoint, config: Config, store: Store, corpus: Artifact) -> tuple[Artifact, bool]:
    return evaluate_endpoint(config.eval, endpoint, corpus, store, context_tokens=config.data.row_tokens)


def _of_model(found: Target, config: Config, store: Store, corpus: Artifact) -> tuple[Artifact, bool]:
    return evaluate_model(
        config.eval,
        found.model,
        corpus,
        store,
        context_tokens=config.data.row_tokens,
        seed=config.seed,
        module=_own_module(found.run),
    )


def _by_kind(model: Artifact, run: Run, store: Store, stages: Stages) -> Artifact:
    """The loss and metrics of a run's model on the run's held-out rows, recorded in the run."""
    manifest = run.manifest()
    listed = {
        name: open_artifact(store.root / entry["path"])
        for name, entry in manifest["artifacts"].items()
        if name in ("corpus", "tokenizer", "shards", "packing", "reference", *_BASES)
    }
    data = Data(
        listed["corpus"],
        listed["tokenizer"],
        listed["shards"],
        listed.get("packing"),
        {name: listed[name] for name in _BASES if name in listed},
    )
    reference = listed.get("reference")
    config = from_plain(manifest["config"])
    made = stages.produce("evaluation", lambda: evaluate_kind(config, model, data, reference, store), figures_words)
    run.record_artifact("evaluation", made)
    return made


def _own_module(run: Run | None) -> Any:
    """The user's own module of a run, with its weights; `None` for a model that Transformers loads."""
    if run is None:
        return None
    manifest = run.manifest()
    if ":" not in manifest["config"]["model"]["name"]:
        return None
    model, tokenizer = (
        open_artifact(run.store.root / manifest["artifacts"][name]["path"]) for name in ("model", "tokenizer")
    )
    return rebuild_own_module(from_plain(manifest["config"]), model, tokenizer)
