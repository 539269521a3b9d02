"""MLflow's own UI over the store, in a process of its own for as long as it is wanted."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kajiya.errors import ConfigError, MissingExtraError, StoreError
from kajiya.run.store import Store
from kajiya.run.trackers.environment import tracker_environment
from kajiya.run.trackers.mlflow import artifact_root, default_uri

_POLL_S = 0.2
_START_S = 120.0
_STOP_S = 5.0


def open_ui(store: Store, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve MLflow's UI until `KeyboardInterrupt`; `on_ready(url)` is called once it answers.

    `port` 0 takes a free one. Raises `MissingExtraError` without MLflow, `ConfigError` for an address that cannot be
    listened on, `StoreError` when MLflow ends by itself; its output is in `mlflow-ui.log` in the store.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("mlflow", "track", "kajiya ui")
    port = _free_port(host, port)
    store.root.mkdir(parents=True, exist_ok=True)
    log = store.root / "mlflow-ui.log"
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    with _server(store, host, port, log) as server:
        try:
            _wait_until_it_answers(server, url, log)
            on_ready(url)
            server.wait()
        except KeyboardInterrupt:
            return
        raise StoreError(f"MLflow's UI ended by itself with status {server.returncode}; {log} says why.")


@contextmanager
def _server(store: Store, host: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    words = ["ui", "--backend-store-uri", default_uri(store.root), "--host", host, "--port", str(port)]
    words += ["--default-artifact-root", artifact_root(store.root), "--no-serve-artifacts", "--workers", "1"]
    environment = tracker_environment(os.environ, store.root) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlflow", *words],
            cwd=store.root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the server and its workers
        )
    try:
        yield server
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_S)


def _wait_until_it_answers(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # A proxy of the environment has no business between two processes of one machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_S
    while server.poll() is None:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise StoreError(f"MLflow's UI did not answer within {_START_S:.0f} s; {log} may say why.") from None
            time.sleep(_POLL_S)
    raise StoreError(f"MLflow's UI ended while starting, with status {server.returncode}; {log} says why.")


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, after making sure that it can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            "port",
            f"{host}:{port} cannot be listened on ({error.strerror})",
            "Choose another; --port 0 takes a free one.",
        ) from error
