"""A connection to the server, which nobody holds without using it."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guard import CROWDED
from .limits import CONNECTIONS, TO_ASK, TO_READ

__all__ = ["Connection"]


class Connection(H11Protocol):
    """uvicorn's connection, with an end to all waiting for the other side.

    By itself uvicorn waits without end for a first request, for a head that comes drop by drop, and for a reader who
    takes nothing of an answer. Here a connection to which no answer is owed has `TO_ASK` seconds to ask completely,
    and an answer of which nothing is taken for `TO_READ` seconds is given up. (The body of a request has its time in
    `Guard`.)

    Beyond `CONNECTIONS` the newcomers are told to come back, so that those who are there go on; beyond twice as many
    they are cut off, so that files are left for the bank.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._asking = self.loop.call_later(TO_ASK, self._end_if_silent)
        self._reading = self.loop.call_later(TO_READ, self._end_if_unread, 0)
        if len(self.connections) > CONNECTIONS:
            self.app = _crowded
        if len(self.connections) > 2 * CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._asking.cancel()
        self._reading.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._asking.cancel()
        self._asking = self.loop.call_later(TO_ASK, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _end_if_unread(self, before: int) -> None:
        """Gives up if as much waits to be read as some time before, even in a connection that is being closed."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread == before:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(TO_READ, self._end_if_unread, unread)


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    await CROWDED(scope, receive, send)
