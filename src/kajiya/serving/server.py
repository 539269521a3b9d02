"""Runs the API: binds, loads, announces, and ends gracefully."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kajiya.config.schema import ServeConfig
from kajiya.config.tables import resolve
from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.run.process import share_heaps
from kajiya.serving.api import create_app
from kajiya.serving.engine import Engine
from kajiya.serving.gate import log_to_stderr, read_keys
from kajiya.serving.hosts import source_of
from kajiya.serving.listen import announce_and_run, bind, check_tls, web_server
from kajiya.serving.loading import EngineOptions
from kajiya.serving.proven import Proofs


def serve(
    cfg: ServeConfig,
    folder: Path,
    name: str,
    on_ready: Callable[[str], None],
    on_engine: Callable[[str], None] | None = None,
    proofs: Proofs | None = None,
) -> None:
    """Serve the model in `folder` as `name` until SIGINT or SIGTERM; `on_ready` gets the URL once it answers.

    `on_engine` hears before that which runner drives the model, and why where that is not the first choice. With
    `proofs`, what it is held to is kept, so that a later start takes less time.

    Raises `ConfigError` for an address that cannot be bound, and what `load_engine` raises.
    """
    share_heaps()
    # Said before a model is loaded.
    check_tls(cfg.tls_certificate, cfg.tls_key)
    read_keys(cfg.api_key)
    check_names(cfg, cfg.model_name or name)
    if cfg.access_log:
        log_to_stderr()
    if cfg.engine == "vllm":
        from kajiya.serving.vllm import serve_vllm

        serve_vllm(cfg, folder, name, on_ready)
        return

    def load(path: Path) -> Engine:
        return open_engine(replace(cfg, adapters={}, draft=None), path)

    # Bound first: a busy port is said at once, not after a model has been loaded.
    with contextlib.closing(bind(cfg.host, cfg.port)) as listener:
        others = {other: source_of(other, Path(path), load) for other, path in cfg.models.items()}
        engine = open_engine(cfg, folder, proofs)
        if on_engine is not None:
            on_engine(engine.facts.note)
        tokenizer = load_tokenizer(folder)
        app = create_app(engine, tokenizer, cfg.model_name or name, cfg, others, load)
        announce_and_run(web_server(app, cfg), listener, on_ready)


def check_names(cfg: ServeConfig, name: str) -> None:
    """Raise `ConfigError` where the model `name`, its adapters and the further models have not all names of their own."""
    for field, names, others in (
        ("adapters", cfg.adapters, {name}),
        ("models", cfg.models, {name, *cfg.adapters}),
    ):
        for taken in sorted(names.keys() & others):
            raise ConfigError(
                f"serve.{field}.{taken}",
                "is the name of another model or adapter of this server",
                "Give each a name of its own; the model's is serve.model_name.",
            )


def open_engine(cfg: ServeConfig, folder: Path, proofs: Proofs | None = None) -> Engine:
    """The engine that the settings name, over the model in `folder`, with their adapters, in this process."""
    if cfg.engine == "vllm":
        raise ConfigError(
            "serve.engine", "vllm is a server, and no engine of this process", "Leave it at torch, or use kajiya serve."
        )
    load, _ = resolve("engine", cfg.engine, {}, "serve.engine")
    engine: Engine = load(folder, options=options_of(cfg), runner=cfg.runner, proofs=proofs)
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
