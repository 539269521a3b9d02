"""vLLM behind the same command: its server in an environment of its own, awaited, passed through and stopped."""

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError, KajiyaError
from kajiya.run.files import read_json
from kajiya.serving.adapters import is_adapter

_STOP_S = 20
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; an adapter of a higher rank does not load."""
_ONLY_OURS: tuple[tuple[str, Any, str], ...] = (
    ("runner", "auto", "Leave it at auto."),
    ("device", "auto", "Say which devices vLLM sees by CUDA_VISIBLE_DEVICES."),
    ("quantize", "none", "Quantize the artifact (kajiya quantize) and serve that."),
    ("guesses", 0, "Leave it at 0."),
    ("draft", None, "Leave it out."),
    ("cache_precision", "auto", "Leave it at auto."),
    ("cache_tokens", None, "Leave it out."),
    ("models", {}, "Start one server for each model."),
    ("idle_unload_s", None, "Leave it out."),
    ("max_answer_tokens", None, "Leave it out."),
    ("allow_loading", False, "Name the adapters in serve.adapters."),
)
"""Settings of the other engine that vLLM is not told, with the values that ask for nothing, and what to do instead."""


def command_line(cfg: ServeConfig, folder: Path, name: str, port: int, template: Path | None) -> list[str]:
    """What starts vLLM's server on a port of this machine alone. Raises `ConfigError` for what it cannot be told."""
    executable = shutil.which(cfg.vllm)
    if executable is None:
        raise ConfigError(
            "serve.vllm",
            f"{cfg.vllm!r} is not here",
            "Install vLLM in an environment of its own (python -m venv vllm && vllm/bin/pip install vllm) and give its "
            "command: serve.vllm=vllm/bin/vllm",
        )
    for field, neutral, remedy in _ONLY_OURS:
        if getattr(cfg, field) != neutral:
            raise ConfigError(f"serve.{field}", "is not for serve.engine=vllm", remedy)
    dtype = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}[cfg.precision]
    words = [executable, "serve", str(folder), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", dtype, "--max-num-seqs", str(cfg.max_batch), "--max-logprobs", "20"]
    # The defaults of the other engine: nothing out of the model's own generation settings but the length that is asked for here.
    words += ["--generation-config", "vllm"]
    words += ["--override-generation-config", json.dumps({"max_new_tokens": cfg.default_max_tokens})]
    if template is not None:
        words += ["--chat-template", str(template)]
    if cfg.adapters:
        words += ["--enable-lora", "--max-loras", str(len(cfg.adapters))]
        words += ["--max-lora-rank", str(_lora_rank(cfg.adapters)), "--lora-modules"]
        words += [f"{adapter}={path}" for adapter, path in cfg.adapters.items()]
    return words


def _lora_rank(adapters: Mapping[str, str]) -> int:
    """The rank that holds every adapter. Raises `ConfigError` for a folder that is none, or a rank past vLLM's."""
    most = 0
    for name, path in adapters.items():
        if not is_adapter(Path(path)):
            raise ConfigError(f"serve.adapters.{name}", f"{path!r} has no adapter_config.json", "Give PEFT's folder.")
        settings = read_json(Path(path) / "adapter_config.json")
        most = max(most, settings["r"], *(settings.get("rank_pattern") or {}).values())
    found = next((rank for rank in _LORA_RANKS if rank >= most), None)
    if found is None:
        raise ConfigError(
            "serve.adapters",
            f"an adapter has rank {most}, and vLLM takes {_LORA_RANKS[-1]} at most",
            "Merge it (kajiya merge).",
        )
    return found


def serve_vllm(cfg: ServeConfig, folder: Path, name: str, on_ready: Callable[[str], None]) -> None:
    """Serve the model in `folder` by vLLM until SIGINT or SIGTERM, behind this server's address, key, bounds and page."""
    import uvicorn

    from kajiya.serving.listen import DRAIN_S, announce_and_run, bind

    with ExitStack() as stack:
        listener = stack.enter_context(closing(bind(cfg.host, cfg.port)))
        template = _template(folder, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        port = _free_port()
        process = subprocess.Popen(command_line(cfg, folder, cfg.model_name or name, port, template))
        stack.callback(_stop, process)
        upstream = f"http://127.0.0.1:{port}"
        _await_health(upstream, process, cfg.vllm_start_s)
        app = proxy(upstream, cfg)
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
        announce_and_run(server, listener, on_ready)


def proxy(upstream: str, cfg: ServeConfig) -> Any:
    """An application that passes every request on, streams included, and serves the playground page itself."""
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from kajiya.serving.api import playground_page
    from kajiya.serving.faults import error_reply
    from kajiya.serving.gate import Gate, Limits
    from kajiya.serving.metrics import Metrics
    from kajiya.serving.passing import PassedOn

    client = httpx.AsyncClient(base_url=upstream, timeout=None)

    most, n_open = cfg.max_batch + cfg.max_waiting, 0

    async def forward(request: Request) -> Response:
        nonlocal n_open
        if request.method == "POST" and n_open >= most:
            return error_reply(
                f"The server is busy: {n_open} requests run or wait. Try again shortly.", 429, "queue_full"
            )
        headers = {key: value for key, value in request.headers.items() if key not in ("host", "content-length")}
        target = httpx.URL(request.url.path, query=request.url.query.encode())
        sent = client.build_request(request.method, target, headers=headers, content=await request.body())
        n_open += 1
        try:
            reply = await client.send(sent, stream=True)
        except BaseException as error:
            n_open -= 1
            if isinstance(error, httpx.TransportError):
                return error_reply(f"vLLM does not answer: {error}", 503, "engine_stopped")
            raise

        async def close() -> None:
            nonlocal n_open
            n_open -= 1
            await reply.aclose()

        kept = {
            key: value for key, value in reply.headers.items() if key not in ("content-length", "transfer-encoding")
        }
        return PassedOn(reply.aiter_raw(), reply.status_code, kept, close)

    async def page(_: Request) -> Response:
        return playground_page()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/", page), Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)
    limits = Limits(cfg.api_key, cfg.max_body_bytes, cfg.request_timeout_s, cfg.access_log, cfg.log_prompts)
    app.add_middleware(Gate, limits=limits, metrics=Metrics())
    return app


def _template(folder: Path, scratch: Path) -> Path | None:
    """The plain default template, where the tokenizer has none of its own: the same as in training and evaluation."""
    from transformers import AutoTokenizer

    from kajiya.data.chat import default_template

    if AutoTokenizer.from_pretrained(folder).chat_template:
        return None
    path = scratch / "chat.jinja"
    path.write_text(default_template(), encoding="utf-8")
    return path


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


def _await_health(upstream: str, process: "subprocess.Popen[bytes]", limit_s: float) -> None:
    import httpx

    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise KajiyaError(f"vLLM ended with code {process.returncode} before it was ready; its messages are above.")
        try:
            if httpx.get(f"{upstream}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise KajiyaError(f"vLLM was not ready after {limit_s:g} s.\nserve.vllm_start_s gives it longer.")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
