"""Evaluate any model on the held-out text of a recipe."""

from typing import Any

from kajiya.config.compose import from_plain
from kajiya.config.schema import Config
from kajiya.data.corpus import build_corpus
from kajiya.data.progress import OnEvent, silent
from kajiya.evals.evaluate import evaluate_model, measure_baselines
from kajiya.flows.own_module import rebuild_own_module
from kajiya.flows.stages import Stages
from kajiya.flows.targets import find_model
from kajiya.run.folder import Run
from kajiya.run.process import keep_large_blocks, quiet_torchao
from kajiya.run.store import Artifact, Store, open_artifact


def evaluate(target: str, config: Config, store: Store, *, on_event: OnEvent = silent) -> tuple[Artifact, Artifact]:
    """The evaluation of `target` (a run, an artifact, a folder, a hub name) and the baselines on the same bytes.

    `config` says which text, from which part is held out, and how it is scored.
    """
    keep_large_blocks()
    quiet_torchao()
    found = find_model(target, store)
    stages = Stages(on_event)
    corpus = stages.produce("corpus", lambda: build_corpus(config.data, store, on_event), lambda _: "")
    baselines = stages.produce(
        "baselines", lambda: measure_baselines(config.eval.baselines, corpus, store), lambda _: ""
    )
    evaluation = stages.produce(
        "evaluation",
        lambda: evaluate_model(
            config.eval,
            found.model,
            corpus,
            store,
            context_tokens=config.data.row_tokens,
            seed=config.seed,
            module=_own_module(found.run),
        ),
        lambda _: "",
    )
    return evaluation, baselines


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
