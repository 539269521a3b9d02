"""Runs the API: binds, loads, announces, and ends gracefully."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import uvicorn

from kajiya.config.schema import ServeConfig
from kajiya.config.tables import resolve
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.gate import access_log
from kajiya.serving.hosts import source_of
from kajiya.serving.listen import DRAIN_S, announce_and_run, bind, check_tls
from kajiya.serving.loading import EngineOptions


def serve(cfg: ServeConfig, folder: Path, name: str, on_ready: Callable[[str], None]) -> None:
    """Serve the model in `folder` as `name` until SIGINT or SIGTERM; `on_ready` gets the URL once it answers.

    Raises `ConfigError` for an address that cannot be bound, and what `load_engine` raises.
    """
    check_tls(cfg.tls_certificate, cfg.tls_key)
    if cfg.engine == "vllm":
        from kajiya.serving.vllm import serve_vllm

        serve_vllm(cfg, folder, name, on_ready)
        return
    from transformers import AutoTokenizer

    def load(path: Path) -> Engine:
        return open_engine(replace(cfg, adapters={}, draft=None), path)

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
        draft=cfg.draft,
    )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
