"""Weights that a config names beside the model's own: found by any name, known by their digest and not by their place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Finished, small_overrides

from kajiya.config.compose import compose
from kajiya.data.progress import silent
from kajiya.errors import StoreError
from kajiya.flows.bases import find_bases, loss_without_place
from kajiya.run.store import artifact_key


def _policy(*paths: str) -> list[str]:
    parts = ["{name: exact_match}", *(f"{{name: model, options: {{path: '{path}'}}}}" for path in paths)]
    return [f"train.loss.options.rewards=[{', '.join(parts)}]"]


def test_reward_models_are_found_as_a_teacher_is(finished: Finished, tmp_path: Path) -> None:
    """By run, by folder; a hub name stays one."""
    model = finished.trained.model
    elsewhere = shutil.copytree(model.path, tmp_path / "elsewhere")
    config = compose("stdlib-grpo", _policy(finished.trained.run.id, str(elsewhere), "owner/name"))
    based = find_bases(config, finished.store, silent)
    assert {name: each.digest for name, each in based.parents.items()} == {
        "reward_1": model.digest,
        "reward_2": model.digest,
    }
    options = [part.get("options", {}) for part in based.config.train.loss.options["rewards"]]
    assert [each.get("path") for each in options] == [None, str(model.path), str(elsewhere), "owner/name"]
    placeless = loss_without_place(based.config.train.loss).options["rewards"]
    assert [part.get("options", {}).get("path") for part in placeless] == [None, "(parent)", "(parent)", "owner/name"]
    # What the config said is not written to.
    assert config.train.loss.options["rewards"][1]["options"]["path"] == finished.trained.run.id
    with pytest.raises(StoreError, match="no-such-run"):
        find_bases(compose("stdlib-grpo", _policy("no-such-run")), finished.store, silent)


def test_other_weights_in_the_same_folder_are_another_training(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    for path in finished.trained.model.path.iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, folder)
    keys = []
    for _ in range(2):
        based = find_bases(compose("stdlib-grpo", _policy(str(folder))), finished.store, silent)
        keys.append(artifact_key("model", "code", loss_without_place(based.config.train.loss), based.parents))
        weights = folder / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    assert keys[0] != keys[1]


def test_a_teacher_is_still_one(finished: Finished) -> None:
    run = finished.trained.run.id
    config = compose("stdlib-pretrain", ["train.loss.name=distill", f"train.loss.options.teacher={run}"])
    based = find_bases(config, finished.store, silent)
    assert based.parents["teacher"].digest == finished.trained.model.digest
    assert based.config.train.loss.options["teacher"] == str(finished.trained.model.path)
    assert loss_without_place(based.config.train.loss).options["teacher"] == "(parent)"


@pytest.mark.parametrize(
    "settings",
    [
        small_overrides("model.path=some/model", "tokenizer.path=some/model", "model.n_params=null"),
        small_overrides("tokenizer.path=nowhere/else"),
        ["data.source.name=hub", "data.source.options.path=some/dataset"],
    ],
    ids=["model", "tokenizer", "dataset"],
)
def test_a_hub_that_does_not_answer_is_two_lines(settings: list[str], tmp_path: Path) -> None:
    """Nothing listens on the port: the error is the client's own, whatever library it is made with."""
    words = [sys.executable, "-m", "kajiya", "plan", "stdlib-pretrain", *settings, "--store", str(tmp_path)]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"error: \w+/\w+: is no folder here, and the hub has no such (model|dataset) or cannot be reached: .*refused\n"
        r"Give an existing folder, or check the name, the revision and the network\.\n",
        done.stderr,
    )


def test_without_a_network_the_commit_is_that_of_the_hubs_cache(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--some--model"
    (kept / "snapshots" / "c0ffee").mkdir(parents=True)
    (kept / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("c0ffee")
    code = "from kajiya.data.origin import resolve_commit; print(resolve_commit('some/model', None, 'model'))"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "c0ffee\n"
