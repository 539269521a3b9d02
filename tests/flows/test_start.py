"""What a start loads: a training before its first step, and a server of what was just trained."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.conftest import Finished, small_overrides

from kajiya.models import open as opening
from kajiya.serving.driving import precision_of
from kajiya.serving.loading import load_engine, pick_device, pick_dtype
from kajiya.serving.proven import Proofs, find_proven

NOT_NEEDED = {
    *("datasets", "fastapi", "lm_eval", "matplotlib", "mlflow", "optuna", "pandas", "peft", "pyarrow", "ray", "scipy"),
    *("seaborn", "sklearn", "torchao", "torchmetrics", "uvicorn", "wandb", "kajiya.serving.cache"),
}

_PROGRAM = textwrap.dedent(
    """
    import json, os, sys
    from kajiya.config.compose import compose
    from kajiya.flows.train import Scope, train
    from kajiya.run.store import Store

    def hear(kind, **fields):
        if kind == "metrics" and "train/lr" in fields["values"]:
            print(json.dumps(sorted(sys.modules)), flush=True)
            os._exit(0)

    overrides = json.loads(sys.argv[2])
    train(compose("stdlib-pretrain", overrides), Store(__import__("pathlib").Path(sys.argv[1])), on_event=hear)
    """
)


def test_what_a_training_has_loaded_by_its_first_step(finished: Finished) -> None:
    """With data and verdict kept; another length is another run of the same verdict."""
    overrides = [*small_overrides(), "train.steps=3", "train.log_every=1", "track.trackers=[]"]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(finished.store.root), json.dumps(overrides)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "transformers.modeling_utils", "kajiya.training.fit"} <= loaded
    assert NOT_NEEDED & loaded == set()


def test_what_was_just_trained_is_served_without_transformers_model(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its evaluation has proven the engine that drew the samples, and kept that."""
    model, device = finished.trained.model, pick_device("auto")
    if device.type != "cpu":
        pytest.skip("the C++ decoder is for a CPU")
    precision = precision_of(pick_dtype("auto", device))
    proofs = Proofs(finished.store, model.digest)
    assert find_proven(proofs, precision, precision) is not None

    def refuse(*_: object) -> None:
        raise AssertionError("Transformers' model was opened")

    monkeypatch.setattr(opening, "open_model", refuse)
    engine = load_engine(Path(model.path), proofs=proofs)
    assert engine.facts.note.startswith("native")
