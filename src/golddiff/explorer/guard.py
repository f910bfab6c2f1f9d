"""Who may talk to the server: the browser of this machine, or who has the token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "cookie_of", "is_loopback"]

COOKIE = "golddiff"  # and a part of a hash of the token: cookies are shared by all ports of a host
LARGEST_BODY = 2**16
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses what a stranger may send, before it reaches the application.

    On loopback the Host header has to name this machine, so that a foreign page that resolves its own name to
    127.0.0.1 learns nothing. Elsewhere a token has to be shown: as `?token=` once (it becomes a cookie), as the cookie,
    or as `Authorization: Bearer`. Everywhere a request with a foreign Origin is refused, and so are large bodies.

    Arguments:
        token: None on loopback.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        body = await _body(receive)
        if body is None:
            await TOO_LARGE(scope, receive, guarded)
            return
        await self.app(scope, _replayed(body, receive), guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and not is_loopback(_name_of(host)):
            return _problem(421, "this server answers to 127.0.0.1 and localhost only: use the address it printed")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _problem(403, "this request comes from a page of another site: open the explorer itself")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > LARGEST_BODY:
            return TOO_LARGE
        return None if self.token is None else self._without_token(scope, headers, self.token)

    def _without_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if _same(asked, token) and scope["method"] == "GET" and scope["path"] == "/":
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie_of(token), token, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if (kind.lower() == "bearer" and _same(bearer, token)) or _same(_cookie(headers, cookie_of(token)), token):
            return None
        return _problem(401, "this server wants its token: open the address that it printed, with ?token= at its end")


async def _body(receive: Receive) -> bytes | None:
    """What a request sends; None if it is larger than it may be, or breaks off."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY or message["type"] == "http.disconnect":
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the application the body that was read."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _name_of(host: str) -> str:
    """`localhost:8765` -> `localhost`, `[::1]:8765` -> `::1`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def cookie_of(token: str) -> str:
    """The name of the cookie that holds a token."""
    return f"{COOKIE}-{hashlib.blake2b(token.encode(), digest_size=4).hexdigest()}"


def _cookie(headers: Headers, name: str) -> str:
    """The value of a cookie, whatever the cookies of others look like."""
    for part in headers.get("cookie", "").split(";"):
        found, _, value = part.strip().partition("=")
        if found == name:
            return value.strip('"')
    return ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _problem(status: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status, {"Cache-Control": "no-store"})


TOO_LARGE = _problem(413, f"this request is too large: send at most {LARGEST_BODY} bytes")
