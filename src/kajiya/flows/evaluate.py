"""Evaluate any model: one that writes text on the held-out text of a recipe, any other on the held-out rows of its run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from kajiya.config.compose import from_plain
from kajiya.config.schema import Config
from kajiya.data.corpus import build_corpus
from kajiya.data.progress import OnEvent, silent
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.evaluate import evaluate_model, measure_baselines
from kajiya.evals.evaluate_endpoint import evaluate_endpoint
from kajiya.flows.feeding import Data
from kajiya.flows.kind_evaluation import evaluate_kind
from kajiya.flows.own_module import rebuild_own_module
from kajiya.flows.stages import Stages
from kajiya.flows.targets import Target, find_model, is_endpoint, require_text, writes_text
from kajiya.run.folder import Run
from kajiya.run.process import keep_large_blocks, quiet_torchao
from kajiya.run.store import Artifact, Store, open_artifact

_BASES = ("base", "adapter", "teacher")
"""Names under which a run lists the weights that its training started from."""


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
    classifier, say) is evaluated on that run's own held-out rows, and has no baselines. `model_name` (`None`: the first that is
    served) and `api_key` are an endpoint's.
    """
    keep_large_blocks()
    quiet_torchao()
    store = store.heard_by(on_event)
    stages = Stages(on_event)
    score: Callable[[Artifact], tuple[Artifact, bool]]
    if is_endpoint(target):
        score = partial(_of_endpoint, Endpoint(target, model_name, api_key), config, store)
    else:
        found = find_model(target, store)
        if found.run is not None and not writes_text(found):
            return _by_kind(found.model, found.run, store, stages), None
        require_text(found, "target")
        score = partial(_of_model, found, config, store)
    corpus = stages.produce("corpus", lambda: build_corpus(config.data, store, on_event), lambda _: "")
    baselines = stages.produce(
        "baselines", lambda: measure_baselines(config.eval.baselines, corpus, store), lambda _: ""
    )
    return stages.produce("evaluation", lambda: score(corpus), lambda _: ""), baselines


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
    made = stages.produce("evaluation", lambda: evaluate_kind(config, model, data, reference, store), lambda _: "")
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
