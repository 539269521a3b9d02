"""vLLM behind the same command, played by a stub that refuses every flag which `vllm_flags.txt` does not list."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError, KajiyaError
from kajiya.serving.server import serve
from kajiya.serving.vllm import command_line

FLAGS = Path(__file__).parent / "vllm_flags.txt"
_STUB = """\
#!{python}
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

known = open({flags!r}).read().split()
given = [word for word in sys.argv[1:] if word.startswith("--")]
if sys.argv[1] != "serve" or any(flag not in known for flag in given):
    sys.exit(f"unrecognized arguments: {{given}}")
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(json.dumps({{"seen": sys.argv[1:]}}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if b"slow" in body:
            return self.go_on_until_it_is_gone()
        self.answer(b"data: " + body + b"\\n\\ndata: [DONE]\\n\\n")

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
    import sys
    from pathlib import Path
    from kajiya.config.schema import ServeConfig
    from kajiya.serving.server import serve

    cfg = ServeConfig(
        engine="vllm",
        vllm=sys.argv[2],
        port=0,
        api_key="key",
        adapters={"tuned": sys.argv[3]},
        max_batch=2,
        max_waiting=1,
        default_max_tokens=99,
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


def test_vllm_is_started_awaited_passed_through_and_stopped(model_folder: Path, stub: Path, adapter: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder), str(stub), str(adapter)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
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
            ("--lora-modules", f"tuned={adapter}"),
            ("--max-lora-rank", "32"),
            ("--override-generation-config", '{"max_new_tokens": 99}'),
        ]:
            assert pair in pairs
        # The tokenizer has no template: vLLM is given the one that training and evaluation use.
        assert "--chat-template" in seen
        reply = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "é"})
        assert reply.text == 'data: {"prompt":"é"}\n\ndata: [DONE]\n\n'
        assert "<html" in httpx.get(url).text
        _crowd(url, headers, stub.with_suffix(".gone"))
        upstream = f"http://127.0.0.1:{seen[seen.index('--port') + 1]}"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out.strip()) == (0, "served"), err
    with pytest.raises(httpx.TransportError):
        httpx.get(upstream)


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


def test_its_absence_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install vllm"):
        command_line(ServeConfig(engine="vllm", vllm=str(tmp_path / "none")), tmp_path, "m", 1, None)


@pytest.mark.parametrize(
    "settings",
    [{"quantize": "int8"}, {"device": "cpu"}, {"runner": "plain"}, {"draft": "x"}, {"max_answer_tokens": 5}],
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
