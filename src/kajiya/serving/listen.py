"""The address that a server listens on, and its life until a signal."""

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from kajiya.config.schema import ServeConfig
from kajiya.errors import ConfigError
from kajiya.serving.connections import impatient


class StopSignal:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self.is_asked = False


def announce_and_run(server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Run until a signal; `on_ready` gets the URL once the server answers."""
    scheme = "https" if server.config.is_ssl else "http"
    # Uvicorn raises the signal that ended it once more when it is done; here that is to be nothing, so that `serve` returns.
    with stop_on_signals() as stop:
        asyncio.run(_run(server, listener, lambda url: on_ready(url.replace("http", scheme, 1)), stop))


def web_server(app: Any, cfg: ServeConfig) -> uvicorn.Server:
    """A server for the application `app`, which speaks HTTPS where there is a certificate."""
    return uvicorn.Server(
        uvicorn.Config(
            _unless_cut_off(app),
            http="auto" if cfg.body_timeout_s is None else impatient(cfg.body_timeout_s),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=cfg.drain_s,
            ssl_certfile=cfg.tls_certificate,
            ssl_keyfile=cfg.tls_key,
        )
    )


def _unless_cut_off(app: ASGIApp) -> ASGIApp:
    """`app`, where what the end of the server cuts off is no failure to be logged: a request's reply has said so."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return quiet


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


def require_address(host: str, port: int) -> None:
    """Raise `ConfigError` for an address that cannot be had now; it stays free."""
    bind(host, port).close()


def check_tls(certificate: str | None, key: str | None) -> None:
    """Raise `ConfigError` unless these are a certificate and its key in PEM files, or neither is given."""
    if certificate is None:
        if key is not None:
            raise ConfigError("serve.tls_key", "is given without serve.tls_certificate", "Give both, or neither.")
        return
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"serve.{name}", f"there is no file {path!r}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(
            "serve.tls_certificate", f"{certificate!r} and its key do not go together: {error.reason or error}"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address to type into a browser on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _run(
    server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None], stop: StopSignal
) -> None:
    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        if stop.is_asked:  # before Uvicorn listened to signals
            server.should_exit = True
        else:
            on_ready(url_of(listener))

    announcing = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcing


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Within, SIGINT and SIGTERM only say so: whoever started something ends it in order. A closed terminal is a SIGTERM.

    Outside the main thread, where Python takes no signals, it changes nothing.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: Any) -> None:
        stop.is_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
