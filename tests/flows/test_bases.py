"""Weights that a config names beside the model's own: found by any name, known by their digest and not by their place."""

import shutil
from pathlib import Path

import pytest
from tests.conftest import Finished

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
