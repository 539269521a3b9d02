"""Early stopping in the training flow: the run is finished before its last step, and its model is the best one."""

from collections.abc import Callable
from pathlib import Path

from kajiya.config.schema import Config
from kajiya.flows.train import train
from kajiya.run.folder import Run
from kajiya.run.inspect import summarize
from kajiya.run.store import Store


def _evaluations(run: Run) -> list[tuple[int, float]]:
    return [(step, float(value)) for step, value in summarize(run.folder).curves["eval/nll"]]


def test_a_run_that_no_longer_gains_ends_with_its_best_model(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    words = ("train.steps=40", "train.eval_every=2", "train.save_every=40", "train.early_stop_evals=3",
             "train.early_stop_delta=0.5", "train.final=best", "eval.samples=0", "eval.baselines=[]")  # fmt: skip
    done = train(small_config(*words), Store(tmp_path))
    assert done.model is not None
    curve = _evaluations(done.run)
    best = done.model.facts["best_step"]
    assert [step for step, _ in curve] == list(range(2, best + 7, 2))
    assert done.model.facts["steps"] == best + 6 < 40
    assert done.run.manifest()["status"] == "finished"
