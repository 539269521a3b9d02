"""The environment of a tracker's process: what this process has, less what would steer a tracker from outside the config."""

from collections.abc import Mapping
from pathlib import Path

_STEERED = ("WANDB_", "MLFLOW_", "_MLFLOW_", "TENSORBOARD_")
_KEPT = (
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""Credentials are never in a config, so they are taken from where these tools look for them."""


def tracker_environment(inherited: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables for a tracker's process: no telemetry, one thread, own files in `folder` instead of the home folder."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(_STEERED) or name in _KEPT}
    return kept | {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(folder / "wandb-files"),
        "WANDB_CACHE_DIR": str(folder / "wandb-files"),
        "WANDB_DATA_DIR": str(folder / "wandb-files"),
        "GIT_PYTHON_REFRESH": "quiet",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
