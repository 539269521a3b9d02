"""What a person points at: runs, artifacts, folders."""

import os
from pathlib import Path

import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import StoreError
from kajiya.flows.targets import find_model, with_folders
from kajiya.run.folder import open_run
from kajiya.run.store import Store

from ..conftest import Finished


def test_the_servers_further_models_and_draft_may_be_runs(finished: Finished, tmp_path: Path) -> None:
    folder = str(finished.trained.model.path)
    run = finished.trained.run.id
    cfg = ServeConfig(models={"a": run, "b": folder, "c": str(tmp_path)}, draft=run, guesses=2)
    # A recipe's name is its newest run that somebody asked for, and no trial of a search.
    store = Store(tmp_path / "store")
    entry = {"path": os.path.relpath(folder, store.root)}
    for key, facts in (("a" * 10, {}), ("b" * 10, {"study": "search-1"})):
        open_run(store, finished.config, key, []).record(artifacts={"model": entry}, **facts)
    by_recipe = find_model("stdlib-pretrain", store).run
    assert by_recipe is not None
    assert by_recipe.id == "stdlib-pretrain-aaaaaaaaaa"
    found = with_folders(cfg, finished.store)
    assert found.models == {"a": folder, "b": folder, "c": str(tmp_path)}
    assert found.draft == folder
    assert with_folders(ServeConfig(), finished.store) == ServeConfig()
    with pytest.raises(StoreError, match="nothing-of-the-kind"):
        with_folders(ServeConfig(draft="nothing-of-the-kind"), finished.store)
