"""`serve` as a process: announces its address, drains on a signal, says what is wrong with an address."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.listen import bind, url_of
from kajiya.serving.server import serve

from .conftest import NAME

_PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from kajiya.config.schema import ServeConfig
    from kajiya.serving.server import serve

    cfg = ServeConfig(port=0, precision="fp32", device="cpu", max_batch=2)
    serve(cfg, Path(sys.argv[1]), "tiny", lambda url: print(url, flush=True))
    print("served", flush=True)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_answers_end_and_serve_returns(model_folder: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread does for this model; two of them wait for each other on a machine that runs other tests.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/health").json()["model"] == NAME
        body = {"model": NAME, "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out.strip()) == (0, "served"), err


def test_a_busy_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        # There is no model in the folder, and that is not what is complained of.
        with pytest.raises(ConfigError, match=f"{port} on 127.0.0.1 is in use") as caught:
            serve(ServeConfig(port=port), tmp_path, NAME, lambda url: None)
    assert caught.value.field == "serve.port"
    assert "serve.port=0" in caught.value.remedy


def test_a_host_that_is_not_ours_is_said() -> None:
    with pytest.raises(ConfigError, match=r"serve\.host"):
        bind("203.0.113.1", 0)


def test_the_address_can_be_opened_on_this_machine() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_an_ipv6_address_is_bracketed() -> None:
    try:
        listener = bind("::1", 0)
    except ConfigError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")
    with listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"
