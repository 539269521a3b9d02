"""Tasks during training: figures in the log, the best checkpoint by one of them, a training that does not notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kajiya.config.schema import Config
from kajiya.errors import ConfigError
from kajiya.evals.answers import LocalModel
from kajiya.evals.run_task import Question, measure_task
from kajiya.evals.tasks import load_task, read_rows
from kajiya.flows.train import train
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


def test_mistakes_are_said_before_a_step(small_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.tasks.*'stdlib-next-lin' is not one of"):
        train(small_config(*_FAST, "train.tasks=[stdlib-next-lin]"), Store(tmp_path))
