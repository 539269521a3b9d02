"""`kajiya eval … --tasks`: packaged tasks, one's own, and lm-eval's, on a model of this machine or behind an endpoint."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kajiya.config.schema import Config
from kajiya.data.corpus import build_corpus
from kajiya.data.documents import open_documents
from kajiya.data.progress import OnEvent, silent
from kajiya.errors import ConfigError
from kajiya.evals.answers import LocalModel, Respondent
from kajiya.evals.endpoint import Endpoint
from kajiya.evals.fingerprint import Fingerprint
from kajiya.evals.results import TaskResult, write_rows
from kajiya.evals.run_task import Question, evaluate_task
from kajiya.evals.tasks import find_task, read_rows
from kajiya.flows.stages import Stages
from kajiya.flows.targets import Target, find_model, is_endpoint, require_text
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.process import quiet_torchao
from kajiya.run.store import Artifact, Store, produce

_LM_EVAL = "lm-eval:"


@dataclass(frozen=True)
class Asked:
    """What is evaluated, and on how many rows."""

    target: str
    tasks: Sequence[str]
    limit: int | None = None
    model_name: str | None = None
    """Name of the model behind an endpoint; `None`: the first that it serves."""
    api_key: str | None = None


def evaluate_tasks(asked: Asked, config: Config, store: Store, on_event: OnEvent = silent) -> list[TaskResult]:
    """The result of each task. `config` says which text the packaged tasks' rows are made of.

    The results of a run's model are recorded in the run, for its report.
    """
    quiet_torchao()
    stages, store = Stages(on_event), store.heard_by(on_event)
    found = None if is_endpoint(asked.target) else find_model(asked.target, store)
    respondent: Respondent
    if found is None:
        endpoint = Endpoint(asked.target, asked.model_name, asked.api_key)
        respondent, model = endpoint, f"{endpoint.url} {endpoint.model}"
    else:
        _refuse_own_module(found)
        require_text(found, "--tasks")
        respondent, model = LocalModel(found.model.path, config.eval.batch), ""
    results = []
    for name in asked.tasks:
        if name.startswith(_LM_EVAL):
            artifact = _lm_eval(name.removeprefix(_LM_EVAL), found, asked, config, store, stages)
        else:
            artifact = _task(name, respondent, found.model if found else model, asked, config, store, stages)
        if found is not None and found.run is not None:
            found.run.record_artifact(f"task {artifact.facts['task']}", artifact)
        results.append(TaskResult(artifact.path, dict(artifact.facts)))
    return results


def _task(
    name: str, respondent: Respondent, model: Artifact | str, asked: Asked, config: Config, store: Store, stages: Stages
) -> Artifact:
    task = find_task(name)
    documents = None
    if ":" in task.rows:
        corpus = stages.produce("corpus", lambda: build_corpus(config.data, store, stages.on_event), lambda _: "")
        documents = open_documents(corpus.path, "heldout")
    question = Question(task, read_rows(task, documents, asked.limit), config.seed)
    return stages.produce(
        task.name, lambda: evaluate_task(question, respondent, model, store), lambda made: _words(made.facts)
    )


def _words(facts: Any) -> str:
    figures = ", ".join(
        f"{name} {each['value']:.4g}" for name, each in facts["figures"].items() if each["value"] is not None
    )
    return f"{figures} on {facts['n_rows']:,} rows"


def _refuse_own_module(found: Target) -> None:
    if found.run is not None and ":" in found.run.manifest()["config"]["model"]["name"]:
        raise ConfigError(
            "--tasks", "the engine serves models that Transformers can load, and this module is the user's own"
        )


def _lm_eval(name: str, found: Target | None, asked: Asked, config: Config, store: Store, stages: Stages) -> Artifact:
    from importlib.metadata import version

    from kajiya.evals.lm_eval_engine import open_tasks, run_lm_eval, task_name
    from kajiya.evals.lm_eval_results import figures_of

    if found is None:
        raise ConfigError(
            "--tasks", "lm-eval's tasks run on a model of this machine", "lm-eval has a backend of its own for APIs."
        )
    opened = open_tasks([name])
    model = found.model
    fingerprint = Fingerprint(
        **opened.digests(asked.limit),
        code=version("lm-eval"),
        engine=LocalModel.engine,
        dtype=opened.dtype(LocalModel(model.path, 1)),
        sampling="as the task says",
        model=model.digest,
    )

    def make(folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        raw = run_lm_eval(model.path, opened, limit=asked.limit, batch=config.eval.batch)
        read = figures_of(raw, opened.aggregations())
        write_rows(folder, read.columns, read.measured, None)
        facts = {
            "task": task_name(name), "n_rows": read.n_rows, "n_groups": read.n_rows, "figures": read.figures,
            "fingerprint": asdict(fingerprint), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        write_json(folder / "result.json", facts)
        return facts

    return stages.produce(
        name,
        lambda: produce(
            store,
            "task",
            code=code_revision("kajiya.evals.lm_eval_engine", "kajiya.evals.lm_eval_results"),
            config={"lm-eval": task_name(name), "fingerprint": asdict(fingerprint)},
            parents={"model": model},
            make=make,
        ),
        lambda made: _words(made.facts),
    )
