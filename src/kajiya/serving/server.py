"""Runs the API: binds, loads, announces, and ends gracefully."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from kajiya.config.schema import ServeConfig
from kajiya.config.tables import resolve
from kajiya.errors import ConfigError
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.gate import access_log
from kajiya.serving.hosts import source_of
from kajiya.serving.loading import EngineOptions

DRAIN_S = 20
"""Longest wait for running answers after the first signal, seconds; a second signal ends at once."""


def serve(cfg: ServeConfig, folder: Path, name: str, on_ready: Callable[[str], None]) -> None:
    """Serve the model in `folder` as `name` until SIGINT or SIGTERM; `on_ready` gets the URL once it answers.

    Raises `ConfigError` for an address that cannot be bound, and what `load_engine` raises.
    """
    if cfg.engine == "vllm":
        from kajiya.serving.vllm import serve_vllm

        serve_vllm(cfg, folder, name, on_ready)
        return
    from transformers import AutoTokenizer

    def load(path: Path) -> Engine:
        return open_engine(replace(cfg, adapters={}), path)

    # Bound first: a busy port is said at once, not after a model has been loaded.
    with contextlib.closing(bind(cfg.host, cfg.port)) as listener:
        others = {other: source_of(other, Path(path), load) for other, path in cfg.models.items()}
        engine = open_engine(cfg, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        app = create_app(engine, tokenizer, cfg.model_name or name, cfg, others, load)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=DRAIN_S,
                ssl_certfile=cfg.tls_certificate,
                ssl_keyfile=cfg.tls_key,
            )
        )
        if cfg.access_log:
            _log_to_stderr()
        announce_and_run(server, listener, on_ready)


def announce_and_run(server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Run until a signal; `on_ready` gets the URL once the server answers."""
    scheme = "https" if server.config.is_ssl else "http"
    with _quiet_signals():
        asyncio.run(_run(server, listener, lambda url: on_ready(url.replace("http", scheme, 1))))


def open_engine(cfg: ServeConfig, folder: Path) -> Engine:
    """The engine that the settings name, over the model in `folder`, with their adapters."""
    load, _ = resolve("engine", cfg.engine, {}, "serve.engine")
    engine: Engine = load(folder, options=options_of(cfg), runner=cfg.runner)
    for name, path in cfg.adapters.items():
        engine.load_adapter(name, Path(path))
    return engine


def options_of(cfg: ServeConfig) -> EngineOptions:
    """The settings of the server that are the engine's."""
    return EngineOptions(
        precision=cfg.precision,
        device=cfg.device,
        max_batch=cfg.max_batch,
        max_waiting=cfg.max_waiting,
        quantize=cfg.quantize,
        cache_precision=cfg.cache_precision,
        cache_tokens=cfg.cache_tokens,
        guesses=cfg.guesses,
    )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                "serve.port",
                f"{port} on {host} is in use",
                "Stop what listens there, or take a free port: serve.port=0",
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError("serve.port", f"{port} needs privileges", "Ports from 1024 on do not.") from error
        raise ConfigError("serve.host", f"cannot listen on {host!r}: {error.strerror or error}") from error


def url_of(listener: socket.socket) -> str:
    """The address to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _run(server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        on_ready(url_of(listener))

    announcing = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcing


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """Uvicorn raises the signal that ended it once more when it is done; here that is to be nothing, so that `serve` returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def nothing(*_: Any) -> None:
        return None

    before = {number: signal.signal(number, nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
