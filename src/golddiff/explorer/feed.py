"""What happens to a run, as lines that any number of pages follow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["Feed", "Following"]

ALIVE_AFTER = 1.0  # seconds of silence after which a sign of life is sent


class Feed:
    """Events in order, added by one thread and followed by pages in the loop of the server.

    Arguments:
        on_abandoned: called when the last page leaves before the end.
    """

    def __init__(self, on_abandoned: Callable[[], None]) -> None:
        self.events: list[str] = []
        self.ended = False
        self.followers = 0
        self._on_abandoned = on_abandoned
        self._bells: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._lock = threading.RLock()  # a signal may come while it is held

    def add(self, event: BaseModel, last: bool = False) -> None:
        """Adds an event, and wakes who follows; nothing comes after the last."""
        with self._lock:
            if self.ended:
                return
            self.events.append(event.model_dump_json() + "\n")
            self.ended = last
            for loop, bell in self._bells:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(bell.set)

    def left(self) -> None:
        """A page went away."""
        self.followers -= 1
        if self.followers == 0 and not self.ended:
            self._on_abandoned()

    async def follow(self, alive: Callable[[], str]) -> AsyncIterator[str]:
        """All events, from the first on; `alive()` in between when nothing happens for a while."""
        bell, sent = asyncio.Event(), 0
        mine = (asyncio.get_running_loop(), bell)
        with self._lock:
            self._bells.add(mine)
        try:
            while True:
                bell.clear()
                while sent < len(self.events):
                    sent += 1
                    yield self.events[sent - 1]
                if self.ended and sent == len(self.events):
                    return
                try:
                    await asyncio.wait_for(bell.wait(), ALIVE_AFTER)
                except TimeoutError:
                    yield alive()
        finally:
            with self._lock:
                self._bells.discard(mine)


class Following(StreamingResponse):
    """A feed as lines of JSON, which knows when its reader leaves."""

    media_type = "application/x-ndjson"

    def __init__(self, feed: Feed, alive: Callable[[], str]) -> None:
        super().__init__(feed.follow(alive), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.feed = feed
        feed.followers += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.feed.left()
