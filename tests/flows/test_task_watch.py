"""Tasks during training: figures in the log, the best checkpoint by one of them, a training that does not notice."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Finished

from kajiya.config.schema import Config
from kajiya.errors import ConfigError
from kajiya.evals.answers import LocalModel
from kajiya.evals.run_task import Question, measure_task
from kajiya.evals.tasks import load_task, read_rows
from kajiya.flows.task_watch import TaskWatch
from kajiya.flows.train import train
from kajiya.run.folder import list_runs
from kajiya.run.inspect import summarize
from kajiya.run.store import Store

_FAST = ("train.eval_every=6", "eval.samples=0", "eval.baselines=[]", "preflight.skip=[learning,memory]")


def _task(folder: Path) -> Path:
    rows = [{"q": f"def f{i}(self", "a": "):", "b": " import"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "closing.yaml"
    path.write_text(
        'rows: rows.jsonl\nkind: choose\nprompt: "{{ q }}"\nchoices: ["{{ a }}", "{{ b }}"]\ntarget: "0"\n'
        "metrics: [accuracy, ece]\n",
        encoding="utf-8",
    )
    return path


def test_tasks_are_asked_along_the_way_and_choose_the_best(small_config: Callable[..., Config], tmp_path: Path) -> None:
    task = _task(tmp_path)
    plain = train(small_config(*_FAST), Store(tmp_path / "plain"))
    words = (
        f"train.tasks=[{task}]",
        "train.task_rows=4",
        "train.best_metric=max:task/closing/accuracy",
        "train.final=best",
    )
    asked = train(small_config(*_FAST, *words), Store(tmp_path / "asked"))
    assert plain.model is not None
    assert asked.model is not None
    curves = summarize(asked.run.folder).curves
    assert [step for step, _ in curves["task/closing/accuracy"]] == [6, 12]
    assert curves["eval/nll"] == summarize(plain.run.folder).curves["eval/nll"], "asking moved the training"
    best = max(curves["task/closing/accuracy"], key=lambda point: (float(point[1]), -point[0]))
    assert asked.model.facts["best_step"] == best[0]
    assert float(asked.model.facts["best_heldout_loss"]) == float(best[1])

    last = train(small_config(*_FAST, *words[:2]), Store(tmp_path / "last"))
    assert last.model is not None
    one, other = (load_file(made.path / "model.safetensors") for made in (plain.model, last.model))
    assert all((one[name] == other[name]).all() for name in one)
    # What `kajiya eval --tasks` would say of the finished model.
    question = Question(load_task(task), read_rows(load_task(task), None, 4), 0)
    found: dict[str, Any] = measure_task(question, LocalModel(last.model.path, 16))["figures"]
    log = summarize(last.run.folder).curves
    for name, figure in found.items():
        assert float(log[f"task/closing/{name}"][-1][1]) == pytest.approx(figure["value"], abs=1e-6)
    assert not list(last.run.folder.glob(".tasks-*"))


def test_a_task_that_cannot_be_asked_is_told_and_the_training_goes_on(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(question: Question, respondent: Any) -> dict[str, Any]:
        asked.append(len(asked))
        if len(asked) == 2:
            raise OSError("the judge does not answer")
        return measure_task(question, respondent)

    monkeypatch.setattr("kajiya.flows.task_watch.measure_task", measured)
    words = ("train.best_metric=max:task/closing/accuracy", "train.early_stop_evals=1", "train.eval_every=4")
    done = train(small_config(*_FAST, f"train.tasks=[{_task(tmp_path)}]", *words), Store(tmp_path / "store"))
    assert done.model is not None
    history = summarize(done.run.folder)
    assert [step for step, _ in history.curves["task/closing/accuracy"]] == [4, 12]
    assert [step for step, _ in history.curves["eval/nll"]] == [4, 8, 12], "neither better nor stale"
    assert [text for text in history.warnings if "closing" in text] == [
        "train.tasks: closing has no figures of this evaluation: OSError: the judge does not answer",
        "train.best_metric: an evaluation has no task/closing/accuracy, and counts neither as better nor as stale",
    ]


def test_whatever_a_task_seeds_the_training_draws_on_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def seeds(*_: Any) -> dict[str, Any]:
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        return {}

    monkeypatch.setattr(TaskWatch, "_lm_eval", seeds)
    watch = TaskWatch([], ["any"], rows=4, batch=2, save=lambda folder: None, beside=tmp_path)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert watch(lambda text: None) == {}
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.best_metric=eval/nl"], r"train\.best_metric.*the evaluation gives eval/nll; did you mean 'eval/nll'"),
        (["train.best_metric=task/other/accuracy"], r"train\.best_metric.*train\.tasks asks none"),
        pytest.param(
            ["train.tasks=[lm-eval:hella-swag]"],
            r"train\.tasks: lm-eval knows no task.*'hella-swag'",
            marks=pytest.mark.slow,  # lm-eval reads the files of all its tasks first
        ),
    ],
)
def test_names_that_nothing_has_are_said_before_a_step(
    words: list[str], said: str, small_config: Callable[..., Config], own_finished: Finished
) -> None:
    store = own_finished.store
    known = {run.id for run in list_runs(store)}
    with pytest.raises(ConfigError, match=said):
        train(small_config(*_FAST, *words), store)
    (run,) = (run for run in list_runs(store) if run.id not in known)
    assert summarize(run.folder).step is None
    shutil.rmtree(run.folder)


def test_mistakes_are_said_before_a_step(small_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.tasks.*'stdlib-next-lin' is not one of"):
        train(small_config(*_FAST, "train.tasks=[stdlib-next-lin]"), Store(tmp_path))
