"""What a person points at: runs, artifacts, folders."""

from pathlib import Path

import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import StoreError
from kajiya.flows.targets import with_folders

from ..conftest import Finished


def test_the_servers_further_models_and_draft_may_be_runs(finished: Finished, tmp_path: Path) -> None:
    folder = str(finished.trained.model.path)
    run = finished.trained.run.id
    cfg = ServeConfig(models={"a": run, "b": folder, "c": str(tmp_path)}, draft=run, guesses=2)
    found = with_folders(cfg, finished.store)
    assert found.models == {"a": folder, "b": folder, "c": str(tmp_path)}
    assert found.draft == folder
    assert with_folders(ServeConfig(), finished.store) == ServeConfig()
    with pytest.raises(StoreError, match="nothing-of-the-kind"):
        with_folders(ServeConfig(draft="nothing-of-the-kind"), finished.store)
