"""Fixtures of the trackers' tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, copied into the stores of most tests: MLflow takes ten seconds to make one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    assert len(MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()) == 1
    return path
