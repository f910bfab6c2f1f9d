"""Starting and ending the server."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import webbrowser
from types import FrameType
from typing import Any

from ..bank import Bank
from ..errors import GolddiffError

__all__ = ["serve"]

LAST_WORDS = 0.5  # seconds in which readers can take the end of their streams
PATIENCE = 0.2  # seconds that the step under way has to end


def serve(bank: Bank, host: str = "127.0.0.1", port: int = 8765, *, open_browser: bool = False) -> bool:
    """Serves the explorer of a bank until it is interrupted; whether all work has ended then.

    A step that is being computed cannot be interrupted: it goes on in its thread.

    Arguments:
        host: an address of this machine. Any but loopback can be reached by others, who then need the token that is
            printed.
        port: 0 takes a free one.
        open_browser: open the page.

    Raises:
        GolddiffError: the extra `web` is missing, or the port is taken.
    """
    try:
        import uvicorn

        from .connection import Connection
        from .guard import is_loopback
        from .limits import KEPT, LARGEST_HEAD, TO_ASK
        from .runs import Explorer
        from .web import application
    except ImportError as error:
        raise GolddiffError("the explorer needs the extra web: pip install 'golddiff[web]'") from error
    bank.keep_at_most(KEPT)
    explorer = Explorer(bank)
    listening = _bound(host, port)
    there, taken = listening.getsockname()[:2]
    token = None if is_loopback(host) and is_loopback(there) else secrets.token_urlsafe(24)
    address = _address(host, taken, token)

    class Server(uvicorn.Server):
        """Ends streams at the first Ctrl-C: it stops the worker, whose feeds then say that they are over.

        Who has not sent or read the rest soon after is cut off, which is no error of the application.
        """

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            explorer.worker.stop()
            explorer.close()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(LAST_WORDS, self._cut)
            await super().shutdown(sockets)

        def _cut(self) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    config: Any = uvicorn.Config(
        application(explorer, token),
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=LARGEST_HEAD,
        timeout_keep_alive=int(TO_ASK),
        timeout_graceful_shutdown=1,
        proxy_headers=False,  # anyone may write them
        log_level="error",  # what clients do wrong is not for this log: they could fill it
        access_log=False,
        lifespan="off",
        server_header=False,
    )
    only = "others can reach it: who has the address, token included, can use it" if token else "this machine only"
    print(f"golddiff: {bank} at {address}", flush=True)
    print(f"golddiff: listening on {there} port {taken}: {only}\ngolddiff: Ctrl-C ends it", flush=True)
    if open_browser:
        webbrowser.open(address)
    try:
        Server(config).run([listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
    print("golddiff: stopped", flush=True)
    return explorer.worker.stop(PATIENCE)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    if not 0 <= port <= 65535:
        raise GolddiffError(f"--port is {port}: give a number from 0 to 65535; 0 takes a free one")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise GolddiffError(f"--host {host} is no address of this machine: use 127.0.0.1") from error
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(128)
    except OSError as error:
        made.close()
        raise GolddiffError(
            f"port {port} of {host} cannot be used ({error.strerror}): give another --port, or --port 0 for a free one"
        ) from error
    return made


def _address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    named = socket.gethostname() if host in ("0.0.0.0", "::", "*", "") else f"[{host}]" if ":" in host else host  # noqa: S104
    return f"http://{named}:{port}/" + (f"?token={token}" if token else "")
