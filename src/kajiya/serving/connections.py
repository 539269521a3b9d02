"""Connections that do not say what they want are closed in time: each takes one of the files that a process may open."""

import asyncio
import json

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from kajiya.serving.faults import error_body


def impatient(timeout_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which ends a connection whose next request's head has not come in `timeout_s`: with a 408.

    Uvicorn itself ends those that fall silent behind a reply; not those that say nothing, or half a head.
    """
    words = f"The head of the request took longer to come than this server's limit of {timeout_s:g} s."
    body = json.dumps(error_body(words, 408, "timeout")).encode()
    head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    reply = f"{head}Connection: close\r\n\r\n".encode() + body

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.forget()

        def watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self.forget()
            elif self.due is None and not self.transport.is_closing():
                self.due = self.loop.call_later(timeout_s, self.give_up)

        def forget(self) -> None:
            if self.due is not None:
                self.due.cancel()
                self.due = None

        def give_up(self) -> None:
            self.due = None
            self.transport.write(reply)
            self.transport.close()

    return Impatient
