"""vLLM behind the same command, played by a stub that refuses what the pinned version's parser (`vllm_flags.txt`) would."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError, KajiyaError
from kajiya.serving.server import open_engine, serve
from kajiya.serving.vllm import VERSION, command_line

FLAGS = Path(__file__).parent / "vllm_flags.txt"
_STUB = """\
#!{python}
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

known = {{}}
for line in open({flags!r}):
    if line.startswith("--"):
        flag, _, choices = line.strip().partition(" ")
        known[flag] = choices.strip("{{}}").split(",") if choices else None
for word, after in zip(sys.argv[1:], [*sys.argv[2:], ""]):
    if word.startswith("--") and word not in known:
        sys.exit(f"unrecognized arguments: {{word}}")
    if known.get(word) and after not in known[word]:
        sys.exit(f"argument {{word}}: invalid choice: {{after}}")
if sys.argv[1] != "serve":
    sys.exit("no such command")
open(sys.argv[0] + ".pid", "w").write(str(os.getpid()))
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
worker = subprocess.Popen(["sleep", "600"])
open(sys.argv[0] + ".worker", "w").write(str(worker.pid))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/health" and os.path.exists(sys.argv[0] + ".wait"):
            open(sys.argv[0] + ".asked", "a").write("x")
            return self.send_error(503)
        if self.path.startswith("/v1") and not self.has_key():
            return self.send_error(401)
        model = {{"id": value("--served-model-name"), "max_model_len": 192}}
        self.answer(json.dumps({{"data": [model], "seen": sys.argv[1:]}}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self.has_key():
            return self.send_error(401)
        if b"brief" in body:
            return self.say_three()
        if b"slow" in body:
            return self.go_on_until_it_is_gone()
        self.answer(b"data: " + body + b"\\n\\ndata: [DONE]\\n\\n")

    def has_key(self):
        return self.headers["authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]

    def say_three(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(3):
            self.wfile.write(b"data: more\\n\\n")
            time.sleep(0.3)
        self.wfile.write(b"data: [DONE]\\n\\n")

    def go_on_until_it_is_gone(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"data: more\\n\\n")
                time.sleep(0.02)
        except OSError:
            open(sys.argv[0] + ".gone", "a").write("x")

    def answer(self, content):
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""
_PROGRAM = textwrap.dedent(
    """
    import signal
    import sys
    from pathlib import Path
    from kajiya.config.schema import ServeConfig
    from kajiya.serving.server import serve

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as at a terminal, whatever runs the tests
    cfg = ServeConfig(
        engine="vllm",
        vllm=sys.argv[2],
        port=0,
        api_key="key",
        adapters={"tuned": sys.argv[3]},
        vllm_max_batch=2,
        max_waiting=1,
        default_max_tokens=99,
        max_answer_tokens=150,
        stream_interval=3,
        access_log=True,
        log_prompts=True,
    )
    serve(cfg, Path(sys.argv[1]), "tiny", lambda url: print(url, flush=True))
    print("served", flush=True)
    """
)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text(_STUB.format(python=sys.executable, flags=str(FLAGS)))
    path.chmod(0o755)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "rank_pattern": {"down_proj": 24}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def _serving(model_folder: Path, stub: Path, adapter: Path) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder), str(stub), str(adapter)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_vllm_is_started_awaited_passed_through_and_stopped(model_folder: Path, stub: Path, adapter: Path) -> None:
    waits = stub.with_suffix(".wait")
    waits.touch()
    with _serving(model_folder, stub, adapter) as process:
        _until_asked(stub, process)
        assert process.stdout is not None
        # It has been asked more than once whether it is ready, and was not; nobody has been told of an address.
        assert select.select([process.stdout], [], [], 0)[0] == []
        waits.unlink()
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer key"}
        seen = httpx.get(f"{url}/v1/models", headers=headers).json()["seen"]
        assert seen[:2] == ["serve", str(model_folder)]
        pairs = list(pairwise(seen))
        for pair in [
            ("--served-model-name", "tiny"),
            ("--max-num-seqs", "2"),
            ("--lora-modules", json.dumps({"name": "tuned", "path": str(adapter)})),
            ("--max-lora-rank", "32"),
            ("--generation-config", "vllm"),
            ("--stream-interval", "3"),
            ("--override-generation-config", '{"max_new_tokens": 150}'),
        ]:
            assert pair in pairs
        # The tokenizer has no template: vLLM is given the one that training and evaluation use.
        assert "--chat-template" in seen
        reply = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "é"}).text
        assert reply.endswith("\n\ndata: [DONE]\n\n")
        assert json.loads(reply.splitlines()[0].removeprefix("data: ")) == {"prompt": "é", "max_tokens": 99}
        assert "<html" in httpx.get(url).text
        _crowd(url, headers, stub.with_suffix(".gone"))
        upstream = f"http://127.0.0.1:{seen[seen.index('--port') + 1]}"
        # Nobody on this machine gets past the key by asking there, with this server's key or without.
        for given in ({}, headers):
            assert httpx.post(f"{upstream}/v1/completions", headers=given, json={"prompt": "x"}).status_code == 401
        _break_off(process, url, headers)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "served"), err
    with pytest.raises(httpx.TransportError):
        httpx.get(upstream)
    _is_gone(stub, "pid")
    _is_gone(stub, "worker")
    logged = [json.loads(line) for line in err.splitlines() if line.startswith('{"time"')]
    assert [(line["path"], line["status"], line["body"]) for line in logged][:3] == [
        ("/v1/models", 401, ""),
        ("/v1/models", 200, ""),
        ("/v1/completions", 200, '{"prompt":"é"}'),
    ]


def _until_asked(stub: Path, process: "subprocess.Popen[str]") -> None:
    """Until it has been asked twice whether it is ready."""
    asked = stub.with_suffix(".asked")
    limit = time.monotonic() + 60
    while not (asked.exists() and len(asked.read_text()) >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it was not asked whether it is ready"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_while_it_starts_ends_it(
    model_folder: Path, stub: Path, adapter: Path, number: signal.Signals
) -> None:
    stub.with_suffix(".wait").touch()
    with _serving(model_folder, stub, adapter) as process:
        _until_asked(stub, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "served"), err
    _is_gone(stub, "pid")
    _is_gone(stub, "worker")


def _is_gone(stub: Path, whose: str) -> None:
    """Of the stub's processes; an orphan is the system's to bury, which may take a moment."""
    process, limit = int(stub.with_suffix(f".{whose}").read_text()), time.monotonic() + 60
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit, f"the {whose} is still there"
        time.sleep(0.02)


def _break_off(process: "subprocess.Popen[str]", url: str, headers: dict[str, str]) -> None:
    """Ctrl-C at a terminal, which sends it to the whole group of processes, in the middle of an answer, which ends as it would."""
    with httpx.stream("POST", f"{url}/v1/completions", headers=headers, json={"prompt": "brief"}) as reply:
        lines = reply.iter_lines()
        assert next(lines) == "data: more"
        os.killpg(process.pid, signal.SIGINT)
        assert [line for line in lines if line] == ["data: more", "data: more", "data: [DONE]"]


def _crowd(url: str, headers: dict[str, str], gone: Path) -> None:
    """As many as run and wait are passed on, one more is told to try again, and those that leave make room."""
    with ExitStack() as stack:
        kept = []  # an iterator that is let go of closes its reply
        for _ in range(3):
            slow = httpx.stream("POST", f"{url}/v1/completions", headers=headers, json={"prompt": "slow"}, timeout=60)
            kept.append(stack.enter_context(slow).iter_lines())
            assert next(kept[-1]) == "data: more"
        refused = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "x"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert not gone.exists()
    limit = time.monotonic() + 60
    while not (gone.exists() and gone.read_text() == "xxx"):
        assert time.monotonic() < limit, "vLLM was not told that its clients have left"
        time.sleep(0.02)
    assert httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "x"}).status_code == 200


def test_adapters_that_it_cannot_hold_are_refused(tmp_path: Path, stub: Path, adapter: Path) -> None:
    def words(path: Path) -> list[str]:
        return command_line(
            ServeConfig(engine="vllm", vllm=str(stub), adapters={"a": str(path)}), tmp_path, "m", 1, None
        )

    assert "32" in words(adapter)
    with pytest.raises(ConfigError, match=r"serve\.adapters\.a"):
        words(tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 600}))
    with pytest.raises(ConfigError, match="rank 600"):
        words(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        words(adapter)


def test_an_adapter_is_no_model_for_it(stub: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="kajiya merge"):
        command_line(ServeConfig(engine="vllm", vllm=str(stub)), adapter, "m", 1, None)


def test_it_is_no_engine_of_this_process(model_folder: Path, stub: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.engine: vllm is a server"):
        open_engine(ServeConfig(engine="vllm", vllm=str(stub)), model_folder)


def test_the_flags_are_those_of_the_version_that_is_named() -> None:
    lines = FLAGS.read_text().splitlines()
    assert lines[0] == f"# Every flag of `vllm serve`, vLLM {VERSION}, as its sources define them, with their choices."
    assert len(lines) > 300
    docs = Path(__file__).parents[2] / "docs" / "serving.md"
    assert f"vLLM {VERSION}" in docs.read_text()


def test_its_absence_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"pip install vllm=={VERSION}"):
        command_line(ServeConfig(engine="vllm", vllm=str(tmp_path / "none")), tmp_path, "m", 1, None)


@pytest.mark.parametrize(
    "settings",
    [{"quantize": "int8"}, {"device": "cpu"}, {"runner": "plain"}, {"draft": "x"}, {"max_batch": 5}],
)
def test_what_it_cannot_be_told_is_refused(tmp_path: Path, stub: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"serve\.{next(iter(settings))}"):
        command_line(ServeConfig(engine="vllm", vllm=str(stub), **settings), tmp_path, "m", 1, None)


def test_a_server_that_ends_at_once_is_said(model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(KajiyaError, match="code 3"):
        serve(ServeConfig(engine="vllm", vllm=str(broken), port=0), model_folder, "tiny", lambda url: None)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or shutil.which("vllm") is None,
    reason="no CUDA device with vllm's command on this machine",
)
def test_the_real_one_answers_as_the_model_does(
    model_folder: Path, tokenizer: Any, greedy: Callable[..., list[int]]
) -> None:
    program = """
import sys
from pathlib import Path
from kajiya.config.schema import ServeConfig
from kajiya.serving.server import serve

cfg = ServeConfig(engine="vllm", port=0, precision="fp32", default_max_tokens=12)
serve(cfg, Path(sys.argv[1]), "tiny", lambda url: print(url, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(model_folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next(line for line in process.stdout if line.startswith("http://127.0.0.1:")).strip()
        ids = tokenizer.encode("def wrap(text, width):")
        body = {"model": "tiny", "prompt": ids, "temperature": 0}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert reply["usage"]["completion_tokens"] == 12
        assert reply["choices"][0]["text"] == tokenizer.decode(greedy(ids, 12), skip_special_tokens=True)
        longer = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 30, "ignore_eos": True}, timeout=60)
        assert longer.json()["usage"]["completion_tokens"] == 30
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
