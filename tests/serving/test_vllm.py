"""vLLM behind the same command, played by a stub that refuses every flag which `vllm_flags.txt` does not list."""

import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError, KajiyaError
from kajiya.serving.server import serve
from kajiya.serving.vllm import command_line

FLAGS = Path(__file__).parent / "vllm_flags.txt"
_STUB = """\
#!{python}
import json, sys
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
        self.answer(b"data: " + body + b"\\n\\ndata: [DONE]\\n\\n")

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
        engine="vllm", vllm=sys.argv[2], port=0, api_key="key", adapters={"tuned": "/adapters/tuned"}, max_batch=7
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


def test_vllm_is_started_awaited_passed_through_and_stopped(model_folder: Path, stub: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder), str(stub)],
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
            ("--max-num-seqs", "7"),
            ("--lora-modules", "tuned=/adapters/tuned"),
        ]:
            assert pair in pairs
        # The tokenizer has no template: vLLM is given the one that training and evaluation use.
        assert "--chat-template" in seen
        reply = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "é"})
        assert reply.text == 'data: {"prompt":"é"}\n\ndata: [DONE]\n\n'
        assert "<html" in httpx.get(url).text
        upstream = f"http://127.0.0.1:{seen[seen.index('--port') + 1]}"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out.strip()) == (0, "served"), err
    with pytest.raises(httpx.TransportError):
        httpx.get(upstream)


def test_its_absence_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install vllm"):
        command_line(ServeConfig(engine="vllm", vllm=str(tmp_path / "none")), tmp_path, "m", 1, None)


def test_what_it_cannot_be_told_is_refused(tmp_path: Path, stub: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.quantize"):
        command_line(ServeConfig(engine="vllm", vllm=str(stub), quantize="int8"), tmp_path, "m", 1, None)


def test_a_server_that_ends_at_once_is_said(model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(KajiyaError, match="code 3"):
        serve(ServeConfig(engine="vllm", vllm=str(broken), port=0), model_folder, "tiny", lambda url: None)
