"""vLLM behind the same command: its server in an environment of its own, awaited, passed through and stopped."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError, KajiyaError, MissingExtraError
from kajiya.run.files import read_json
from kajiya.serving.adapters import is_adapter
from kajiya.serving.listen import StopSignal, announce_and_run, bind, stop_on_signals, web_server

VERSION = "0.33.0"
"""The version of vLLM whose flags are used here (`tests/serving/vllm_flags.txt` has all of them)."""
_STOP_S = 20
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; an adapter of a higher rank does not load."""
_ONLY_OURS: tuple[tuple[str, Any, str], ...] = (
    ("runner", "auto", "Leave it at auto."),
    ("device", "auto", "Say which devices vLLM sees by CUDA_VISIBLE_DEVICES."),
    ("quantize", "none", "Leave it at none, or serve weights that are stored as vLLM quantizes them."),
    ("guesses", 0, "Leave it at 0."),
    ("draft", None, "Leave it out."),
    ("cache_precision", "auto", "Leave it at auto."),
    ("cache_tokens", None, "Leave it out."),
    ("models", {}, "Start one server for each model."),
    ("idle_unload_s", None, "Leave it out."),
    ("max_batch", ServeConfig.max_batch, "Say how many it decodes together by serve.vllm_max_batch."),
    ("allow_loading", False, "Name the adapters in serve.adapters."),
)
"""Settings of the other engine that vLLM is not told, with the values that ask for nothing, and what to do instead."""


def command_line(cfg: ServeConfig, folder: Path, name: str, port: int, template: Path | None) -> list[str]:
    """What starts vLLM's server on a port of this machine alone. Raises `ConfigError` for what it cannot be told."""
    executable = _executable(cfg, folder)
    dtype = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}[cfg.precision]
    words = [executable, "serve", str(folder), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", dtype, "--max-num-seqs", str(cfg.vllm_max_batch), "--max-logprobs", "20"]
    # The defaults of the other engine: nothing out of the model's own generation settings.
    words += ["--generation-config", "vllm"]
    if isinstance(cfg.stream_interval, int):
        words += ["--stream-interval", str(cfg.stream_interval)]
    if cfg.max_answer_tokens is not None:
        # A cap on every request, whatever its address; the proxy refuses what asks for more.
        words += ["--override-generation-config", json.dumps({"max_new_tokens": cfg.max_answer_tokens})]
    if template is not None:
        words += ["--chat-template", str(template)]
    if cfg.adapters:
        words += ["--enable-lora", "--max-loras", str(len(cfg.adapters))]
        words += ["--max-lora-rank", str(_lora_rank(cfg.adapters)), "--lora-modules"]
        # Not name=path, which a comma in either makes something else of.
        words += [json.dumps({"name": adapter, "path": path}) for adapter, path in cfg.adapters.items()]
    return words


def _executable(cfg: ServeConfig, folder: Path) -> str:
    """The path of vLLM's command. Raises `ConfigError` where it is not here, or cannot do what is asked."""
    executable = shutil.which(cfg.vllm)
    if executable is None:
        raise ConfigError(
            "serve.vllm",
            f"{cfg.vllm!r} is not here",
            "Install vLLM in an environment of its own (python -m venv vllm && vllm/bin/pip install "
            f"vllm=={VERSION}) and give its command: serve.vllm=vllm/bin/vllm",
        )
    if is_adapter(folder):
        raise ConfigError(
            "serve.engine",
            f"vllm serves whole models, and {str(folder)!r} is an adapter",
            "Merge it (kajiya merge) and serve that, or serve its base with this as one of serve.adapters.",
        )
    for field, neutral, remedy in _ONLY_OURS:
        if getattr(cfg, field) != neutral:
            raise ConfigError(f"serve.{field}", "is not for serve.engine=vllm", remedy)
    return executable


def _lora_rank(adapters: Mapping[str, str]) -> int:
    """The rank that holds every adapter. Raises `ConfigError` for a folder that is none, or a rank past vLLM's."""
    most = 0
    for name, path in adapters.items():
        if not is_adapter(Path(path)):
            raise ConfigError(f"serve.adapters.{name}", f"{path!r} has no adapter_config.json", "Give PEFT's folder.")
        settings = read_json(Path(path) / "adapter_config.json")
        if settings.get("peft_type") != "LORA":
            problem = f"{path!r} is an adapter of kind {settings.get('peft_type')}, and vLLM serves LoRA alone"
            raise ConfigError(f"serve.adapters.{name}", problem, "Merge it (kajiya merge) and serve that.")
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
    try:
        from kajiya.serving.passing import proxy
    except ImportError as error:
        raise MissingExtraError("httpx", "serve", "serve.engine=vllm") from error

    _executable(cfg, folder)
    with ExitStack() as stack:
        listener = stack.enter_context(closing(bind(cfg.host, cfg.port)))
        template = _template(folder, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        port = _free_port()
        words = command_line(cfg, folder, cfg.model_name or name, port, template)
        stop = stack.enter_context(stop_on_signals())
        # Nobody else on this machine gets past the key here by asking there. Not among the words, which everybody can list.
        key = secrets.token_urlsafe(32)
        # Ctrl-C reaches this process alone, which lets running answers end before it ends vLLM.
        process = subprocess.Popen(words, env=os.environ | {"VLLM_API_KEY": key}, start_new_session=True)
        stack.callback(_stop, process)
        upstream = f"http://127.0.0.1:{port}"
        if not _await_health(upstream, process, cfg.vllm_start_s, stop):
            return
        app = proxy(upstream, cfg, _context_tokens(upstream, key), key)
        if stop.is_asked:
            return
        announce_and_run(web_server(app, cfg), listener, on_ready)


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


def _await_health(upstream: str, process: "subprocess.Popen[bytes]", limit_s: float, stop: StopSignal) -> bool:
    """Whether vLLM is ready; `False` where a signal came before it was. Raises `KajiyaError` when it ends or takes too long."""
    import httpx

    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if stop.is_asked:
            return False
        if process.poll() is not None:
            raise KajiyaError(f"vLLM ended with code {process.returncode} before it was ready; its messages are above.")
        try:
            if httpx.get(f"{upstream}/health", timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise KajiyaError(f"vLLM was not ready after {limit_s:g} s.\nserve.vllm_start_s gives it longer.")


def _context_tokens(upstream: str, key: str) -> int:
    import httpx

    models = httpx.get(f"{upstream}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60)
    return int(models.json()["data"][0]["max_model_len"])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End vLLM and its workers: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
