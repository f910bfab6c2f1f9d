"""Who may talk to the server: the browser of this machine, or who has the token."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import re
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import ADDRESSES, BURST, LARGEST_BODY, LARGEST_HEAD, RATE, TO_SEND, Allowance

__all__ = ["CROWDED", "Guard", "cookie_of", "is_loopback"]

COOKIE = "golddiff"  # and a part of a hash of the token: cookies are shared by all ports of a host
HOST = re.compile(r"([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?")  # nothing else, as a user or a path
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
    or as `Authorization: Bearer`. Everywhere requests of foreign pages are refused, and those that are large, slow or
    too many.

    Arguments:
        token: None on loopback.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token, self.allowance = app, token, Allowance(RATE, BURST, ADDRESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # there is nothing else to be had, as websockets
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        body = self._refusal(scope) or await _body(receive)
        if isinstance(body, Response):
            await body(scope, receive, guarded)
        else:
            await self.app(scope, _replayed(body, receive), guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        foreign = self._foreign(headers)
        if foreign is not None:  # without a part of the allowance: it is not the visitor who asks
            return foreign
        wait = self.allowance.take((scope.get("client") or ("",))[0])
        if wait:
            detail = "too many requests come from this address: wait a moment and ask again"
            return _problem(429, detail, {"Retry-After": str(math.ceil(wait))})
        head = [scope.get("raw_path") or b"", scope["query_string"], *(part for pair in headers.raw for part in pair)]
        if sum(map(len, head)) > LARGEST_HEAD:
            return TOO_LONG
        length = headers.get("content-length", "0")
        if "content-length" in headers and "transfer-encoding" in headers:
            return TWO_LENGTHS
        if not length.isdecimal() or len(length) > 12 or int(length) > LARGEST_BODY:
            return TOO_LARGE
        return None if self.token is None else self._without_token(scope, headers, self.token)

    def _foreign(self, headers: Headers) -> Response | None:
        """Refuses requests to another name, and those that a page of another site makes."""
        host = headers.get("host", "").lower()
        named = HOST.fullmatch(host)
        if not named or (self.token is None and not is_loopback(named[1].strip("[]"))):
            return _problem(421, "this server answers to 127.0.0.1 and localhost only: use the address it printed")
        own = [f"http://{host}"] if self.token is None else [f"http://{host}", f"https://{host}"]  # a proxy has TLS
        asked_by = headers.get("sec-fetch-site", "none")  # a browser says so even where it gives no Origin
        embedded = asked_by in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate"
        if embedded or any(origin.lower() not in own for origin in headers.getlist("origin")):
            return _problem(403, "this request comes from a page of another site: open the explorer itself")
        return None

    def _without_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if _same(asked, token) and scope["method"] == "GET" and scope["path"] == "/":
            answer = RedirectResponse("/", 303, {"Cache-Control": "no-store"})
            answer.set_cookie(cookie_of(token), token, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if (kind.lower() == "bearer" and _same(bearer, token)) or _same(_cookie(headers, cookie_of(token)), token):
            return None
        return _problem(401, "this server wants its token: open the address that it printed, with ?token= at its end")


async def _body(receive: Receive) -> bytes | Response:
    """What a request sends; or why it is not taken."""
    body = b""
    try:
        async with asyncio.timeout(TO_SEND):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > LARGEST_BODY or message["type"] == "http.disconnect":
                    return TOO_LARGE
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        return TOO_SLOW


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


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status, {"Cache-Control": "no-store", **(headers or {})})


TOO_LARGE = _problem(413, f"this request is too large: send at most {LARGEST_BODY} bytes")
TOO_LONG = _problem(431, f"address and headers of this request are too long: send at most {LARGEST_HEAD} bytes")
TWO_LENGTHS = _problem(400, "this request has two lengths: send Content-Length or chunks", {"Connection": "close"})
TOO_SLOW = _problem(408, f"this request came too slowly: send it within {TO_SEND:g} seconds", {"Connection": "close"})
CROWDED = _problem(
    503,
    "too many connections are open: close other pages of this server, or come back in a moment",
    {"Retry-After": "5", "Connection": "close", **HEADERS},
)
