"""`kajiya ui`: MLflow's own server answers over the store, and ends with the command."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.schema import Config
from kajiya.errors import ConfigError, MissingExtraError, StoreError
from kajiya.run.folder import open_run
from kajiya.run.store import Store
from kajiya.run.trackers.dispatch import replay
from kajiya.run.ui import open_ui

UI = """
import sys
from kajiya.cli import app
app(sys.argv[1:], standalone_mode=False)
print("left", flush=True)
"""


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read()) if body is not None else answer.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_answers_with_the_stores_runs_and_ends_with_the_command(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(Store(tmp_path), Config(name="tiny"), "a" * 10, [])
    run.events.emit("metrics", step=3, values={"train/loss": 0.25})
    replay(run.folder, "mlflow", {}, timeout_s=120)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy that would answer nothing
    words = [sys.executable, "-c", UI, "ui", "--port", "0", "--store", str(tmp_path)]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert command.stdout is not None
        said = re.match(r"MLflow UI: (http://127\.0\.0\.1:\d+) ", command.stdout.readline())
        assert said, (tmp_path / "mlflow-ui.log").read_text()
        url = said[1]
        assert "<title>MLflow" in ask(url)
        experiment = ask(f"{url}/api/2.0/mlflow/experiments/search", {"max_results": 10, "filter": "name = 'kajiya'"})
        ids = [found["experiment_id"] for found in experiment["experiments"]]
        (shown,) = ask(f"{url}/api/2.0/mlflow/runs/search", {"experiment_ids": ids})["runs"]
        assert shown["info"]["run_name"] == run.id
        assert shown["data"]["metrics"][0]["value"] == 0.25
        command.send_signal(number)
        left, _ = command.communicate(timeout=60)
        assert left == "left\n"
        assert command.returncode == 0
        with pytest.raises(OSError, match="refused"):
            ask(url)
    finally:
        command.kill()
        command.communicate()


def test_a_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port: 127\.0\.0\.1:{port} cannot be listened on .*in use"):
            open_ui(Store(tmp_path), "127.0.0.1", port, pytest.fail)


def test_without_mlflow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kajiya\[track\]'"):
        open_ui(Store(tmp_path), "127.0.0.1", 0, pytest.fail)


def test_a_server_that_ends_while_starting_is_an_error_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "mlflow.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(shims))
    with pytest.raises(StoreError, match=r"ended while starting, with status 3; .*mlflow-ui\.log"):
        open_ui(Store(tmp_path / "store"), "127.0.0.1", 0, pytest.fail)
