"""`serve` as a process: announces its address, drains on a signal, says what is wrong with an address."""

import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.listen import bind, check_tls, url_of
from kajiya.serving.server import serve

from .conftest import NAME

_PROGRAM = textwrap.dedent(
    """
    import signal
    import sys
    from pathlib import Path
    from kajiya.config.schema import ServeConfig
    from kajiya.serving.server import serve

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as at a terminal, whatever runs the tests
    cfg = ServeConfig(port=0, precision="fp32", device="cpu", max_batch=2, tls_certificate=sys.argv[2] or None)
    serve(cfg, Path(sys.argv[1]), "tiny", lambda url: print(url, flush=True))
    print("served", flush=True)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_lets_running_answers_end_and_serve_returns(model_folder: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder), ""],
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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kajiya test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(built.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return path


def test_with_a_certificate_it_speaks_https_and_nothing_else(model_folder: Path, certificate: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model_folder), str(certificate)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=certificate)
        body = {"model": NAME, "prompt": "x", "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body, verify=trusting, timeout=60).status_code == 200
        with pytest.raises(httpx.ConnectError, match=r"self-signed|CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0


def test_a_certificate_that_is_none_is_named(tmp_path: Path, certificate: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for found, key, field in [
        (None, str(certificate), "serve.tls_key"),
        (str(tmp_path / "none"), None, "serve.tls_certificate"),
        (str(certificate), str(tmp_path / "none"), "serve.tls_key"),
        (str(wrong), str(certificate), "serve.tls_certificate"),
    ]:
        with pytest.raises(ConfigError) as caught:
            check_tls(found, key)
        assert caught.value.field == field
    check_tls(str(certificate), None)
    check_tls(None, None)


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
