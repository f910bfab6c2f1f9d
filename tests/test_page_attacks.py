"""What a stranger may send to `golddiff serve`, over real sockets to a real process: it is refused in words, and the
server goes on."""

import json
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="the extra web is not installed")
pytest.importorskip("httpx2", reason="httpx2 is not installed")
from fastapi.testclient import TestClient

import golddiff as gd
from golddiff.explorer import web
from golddiff.explorer.guard import cookie_of
from golddiff.explorer.limits import Allowance
from golddiff.explorer.runs import Explorer
from golddiff.explorer.work import Busy, Worker
from serving import Serving, answered, sentence

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def serving(*arguments, **limits):
    server = Serving(*arguments, **limits)
    yield server
    status, said = server.stop()
    assert (status, said) == (0, "")  # whatever was sent, it ends well and its log has nothing to tell


@pytest.fixture(scope="module")
def server():
    yield from serving()


@pytest.fixture(scope="module")
def impatient():
    """Waits a second where others wait ten, and has room for six connections."""
    yield from serving(TO_ASK=1.0, TO_SEND=1.0, TO_READ=1.0, CONNECTIONS=6, RATE=1e6, BURST=1e6)


# ---- what can be reached -----------------------------------------------------------------------------------------


@linux
def test_it_listens_on_loopback_only_and_says_so(server):
    assert server.lines[1] == f"golddiff: listening on 127.0.0.1 port {server.port}: this machine only\n"
    sockets = [line.split() for line in Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [where for _, where, _, state, *_ in sockets if state == "0A" and where.endswith(f":{server.port:04X}")]
    assert listening == [f"0100007F:{server.port:04X}"]
    assert f":{server.port:04X}" not in Path(f"/proc/{server.process.pid}/net/tcp6").read_text()


PATHS = [
    "/page/../web.py", "/page/..%2fweb.py", "/page/..%2f..%2f..%2f..%2f..%2fetc/passwd", "/page/%2e%2e/%2e%2e/cli.py",
    "/page/../../../../../../etc/passwd", "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/..\\web.py",
    "/page/..%5cweb.py", "/page/%00", "/page/app.js%00", "/page/app.js%00.css", "/page/%0d%0aX:y", "/page/app.js/",
    "/page/./app.js", "/page/x/../app.js", "/page/.", "/page/..", "/page/", "/page", "/page/C:%5cboot.ini",
    "/page/file:///etc/passwd", "//page/app.js", "/page//app.js", "/page/%252e%252e/web.py",
    "/page/%c0%ae%c0%ae/web.py", "/page/%ff%fe", "/page/app.js%20", "/page/APP.JS", "/page/app.js;x=1",
    "/page/__pycache__", "/etc/passwd",
    "/../../../../../etc/passwd", "/..", "/api/rows/../../etc/passwd", "/api/rows/..%2f1.png", "/api/rows/1.png/",
    "/api/rows/1", "/api/rows/1.PNG", "/api/runs/..%2f..%2fetc%2fpasswd", "/api/runs/%00", "/api/bank/", "/api/bank%00",
    "/.git/config", "/docs", "/redoc", "/openapi.yaml", "/favicon.ico/..", "*", "page/app.js", "x",
    "http://127.0.0.1/page/app.js", "http://evil.example/", "file:///etc/passwd",
]  # fmt: skip


def test_no_path_leads_to_the_disk(server):
    for path in PATHS:
        answer = server.ask(path)
        assert answer.status in (400, 404, 422), (path, answer.status)
        assert "root:" not in answer.text
        assert "import" not in answer.text
        assert answer.getheader("Location") is None
    for path in ("+1", "1_0", "1.0", "%201", "01", "%EF%BC%91", "-1", "1e1", "9" * 5000):  # one row has one name
        answer = server.ask(f"/api/rows/{path}.png")
        assert answer.status == 422
        assert sentence(answer) == "row: give a whole number from 0 on, in digits alone"
    assert server.ask("/api/rows/1.png").status == 200


def test_links_in_the_folder_of_the_page_lead_nowhere_else(tmp_path, monkeypatch):
    page = tmp_path / "page"
    page.mkdir()
    (tmp_path / "secret.js").write_text("secret")
    (page / "index.html").write_text("the page")
    (page / "own.js").write_text("own")
    (page / "out.js").symlink_to(tmp_path / "secret.js")
    (page / "in.js").symlink_to(page / "own.js")
    (page / "up").symlink_to(tmp_path)
    monkeypatch.setattr(web, "PAGE", page)
    explorer = Explorer(gd.Bank.build("digits", limit=20), prepare=False)
    with TestClient(web.application(explorer), base_url="http://127.0.0.1") as client:
        (page / "own.js").write_text("changed later")
        assert (client.get("/").text, client.get("/page/own.js").text) == ("the page", "own")
        assert client.get("/page/in.js").text == "own"
        for path in ("out.js", "up/secret.js"):
            assert client.get(f"/page/{path}").status_code == 404
    assert explorer.worker.stop(10)


def test_a_name_that_is_no_text_does_not_end_the_page(tmp_path):
    """Folders may have names of any bytes; they name classes."""
    from PIL import Image

    folder = tmp_path / "b\udce9"
    folder.mkdir()
    for row in range(4):
        Image.new("L", (8, 8), row).save(folder / f"{row}.png")
    explorer = Explorer(gd.Bank.build(tmp_path), prepare=False)
    with TestClient(web.application(explorer), base_url="http://127.0.0.1") as client:
        assert [found["name"] for found in client.get("/api/bank").json()["classes"]] == ["b?"]
    assert explorer.worker.stop(10)


# ---- who asks ----------------------------------------------------------------------------------------------------


HOSTS = [
    "", "evil.example", "localhost.", "localhost:", "localhost:x", "localhost:123456", "localhost/evil.example",
    "localhost#evil", "localhost?evil", "localhost\\evil", "user@localhost", "localhost@evil.example", "localhost evil",
    "127.0.0.1.evil.example", "127.0.0.1,evil.example", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "0",
        "[::1", "::1", "[::]", "[localhost]", "[::1]evil", "[::1%25lo]", "[::ffff:127.0.0.1]evil", "http://localhost",
]  # fmt: skip


def test_it_answers_to_its_own_names_only(server):
    for host in HOSTS:
        answer = server.ask("/api/bank", host=host)
        assert answer.status == 421, host
        assert "127.0.0.1" in sentence(answer)
    for host in ("localhost", "LocalHost:1", "127.0.0.1:65535", "127.0.0.2", "[::1]", "[::1]:80"):
        assert server.ask("/api/bank", host=host).status == 200, host
    assert server.raw(b"GET /api/bank HTTP/1.0\r\n\r\n").status == 421
    assert server.raw(b"GET /api/bank HTTP/1.1\r\n\r\n").status == 400


def test_pages_of_other_sites_are_refused(server):
    own = f"http://{server.host}"
    origins = ["null", "", "evil.example", "http://evil.example", f"https://{server.host}", f"ftp://{server.host}",
               server.host, f"{own}.evil.example", f"{own}/", f"http://x@{server.host}", f"{own} http://evil.example",
               "http://127.0.0.1", "http://localhost", f"http://localhost:{server.port}"]  # fmt: skip
    for origin in origins:
        answer = server.ask("/api/runs", "POST", body=b"{}", headers=[("Origin", origin)])
        assert answer.status == 403, origin
        assert "another site" in sentence(answer)
    for both in ([("Origin", own), ("Origin", "null")], [("Origin", "null"), ("Origin", own)]):
        assert server.ask("/api/runs", "POST", body=b"{}", headers=both).status == 403
    assert server.ask("/api/runs", "POST", body=b"{}", headers=[("Origin", own)]).status == 201
    picture = [("Sec-Fetch-Mode", "no-cors")]  # a picture or a script of another page, which has no Origin
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert server.ask("/api/bank", headers=[*picture, ("Sec-Fetch-Site", site)]).status == status
    link = [("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Site", "cross-site")]
    assert server.ask("/", headers=link).status == 200


def test_beyond_loopback_nothing_is_had_without_the_token():
    server = Serving("--host", "0.0.0.0")  # noqa: S104
    try:
        assert server.lines[1].startswith(f"golddiff: listening on 0.0.0.0 port {server.port}: others can reach it")
        token = server.address.split("token=")[1]
        wrong = ["", token[:-1], token + "x", token.lower(), "%00", "\xe9", "null"]
        for asked in wrong:
            for path in ("/", "/api/bank", "/page/app.js", "/openapi.json", "/nothing", f"/?token={quote(asked)}"):
                answer = server.ask(
                    path, headers=[("Authorization", f"Bearer {asked}"), ("Cookie", f"{cookie_of(token)}={asked}")]
                )
                assert answer.status == 401, path
                assert token not in answer.text
        assert server.ask(f"/api/bank?token={token}").status == 401
        assert server.ask(f"/?token={token}", "POST").status == 401
        assert server.ask("/api/bank", host="bad host", headers=[("Authorization", f"Bearer {token}")]).status == 421
        answer = server.ask(f"/?token={token}")
        assert (answer.status, answer.getheader("Location"), answer.getheader("Cache-Control")) == (
            303,
            "/",
            "no-store",
        )
        cookie = answer.getheader("Set-Cookie")
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert server.ask("/api/bank", headers=[("Cookie", f"a=b; {cookie.split(';')[0]}")]).status == 200
    finally:
        status, said = server.stop()
    assert (status, said) == (0, "")


# ---- what is asked -----------------------------------------------------------------------------------------------


def test_other_methods_are_refused(server):
    for path, allowed in (("/", "GET"), ("/api/bank", "GET"), ("/page/app.js", "GET"), ("/api/runs", "POST")):
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "DELETE", "PROPFIND", "get", "X" * 50):
            answer = server.ask(path, method, headers=[("Cookie", "secret"), ("Access-Control-Request-Method", "POST")])
            assert (answer.status, answer.getheader("Allow")) == (405, allowed), (method, path)
            assert "secret" not in answer.text
            assert (method == "HEAD") == (answer.text == "")
            assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
    assert server.ask("evil.example:443", "CONNECT").status == 404
    assert server.ask("*", "OPTIONS").status == 404


def test_nothing_but_http(server):
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")]  # fmt: skip
    for path, status in (("/", 200), ("/api/nothing", 404)):
        assert server.ask(path, headers=upgrade).status == status  # as if it had not been asked for
    assert server.ask("/", headers=[("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")]).status == 200
    for nonsense in (b"\0" * 100, b"\x16\x03\x01\x02\0\x01\0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n",
                     b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n",
                     b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"):  # fmt: skip
        answer = server.raw(nonsense)
        assert answer.status in (400, 421), nonsense
        assert answer.status == 421 or answer.text == "Invalid HTTP request received."


def test_headers_that_come_twice(server):
    host = f"Host: {server.host}\r\n"
    for twice in (
        f"GET /api/bank HTTP/1.1\r\n{host}Host: evil.example\r\n\r\n",
        f"GET /api/bank HTTP/1.1\r\n{host}{host}\r\n",
        f"POST /api/runs HTTP/1.1\r\n{host}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}",
        f"POST /api/runs HTTP/1.1\r\n{host}Content-Length: 2, 3\r\n\r\n{{}}",
        f"POST /api/runs HTTP/1.1\r\n{host}Content-Length: -2\r\n\r\n{{}}",
        f"POST /api/runs HTTP/1.1\r\n{host}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        f"POST /api/runs HTTP/1.1\r\n{host}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        f"POST /api/runs HTTP/1.1\r\n{host}Transfer-Encoding: gzip\r\n\r\n",
    ):
        assert server.raw(twice.encode()).status in (400, 501), twice


def test_long_heads_and_large_bodies(server):
    assert server.ask("/" + "x" * 15_000).status == 404
    assert server.ask("/api/bank?" + "x=1&" * 3_500).status == 200
    assert server.ask(headers=[(f"X-{number}", "1") for number in range(1000)]).status == 200
    for target, headers in (("/" + "x" * 20_000, []), ("/?" + "x" * 20_000, []), ("/", [("X", "x" * 20_000)])):
        answer = server.ask(target, headers=headers)
        assert answer.status == 400 or (answer.status == 431 and "at most 16384 bytes" in sentence(answer))
    head = f"POST /api/runs HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    for length in ("65537", "9" * 12, "9" * 20):
        answer = server.raw(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert (answer.status, sentence(answer)) == (413, "this request is too large: send at most 65536 bytes")
    assert server.ask("/api/runs", "POST", body=b" " * 65_536).status == 422
    answer = server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"8000\r\n" + b" " * 0x8000 + b"\r\n" + (
        b"8001\r\n" + b" " * 0x8001 + b"\r\n0\r\n\r\n"))  # fmt: skip
    assert answer.status == 413


def test_bodies_that_are_no_settings(server):
    for body in (b"", b"{", b"[" * 60_000, b"\xff\xfe\0", b'{"seed": ' + b"1" * 60_000 + b"}", b'{"seed": NaN}',
                 b'{"\\ud800": 1}', b'{"method": "\\ud800"}', b'{"method": "\\u0000"}', b'{"steps": 1e400}',
                 b'{"without": {"rows": [' + b"0," * 30_000 + b"0]}}", b'{"label": 9007199254740991}'):  # fmt: skip
        answer = server.ask("/api/runs", "POST", body=body)
        assert answer.status in (400, 422), body[:50]
        sentence(answer)


# ---- how much, and how slowly ------------------------------------------------------------------------------------


def closed(made, drops=b""):
    """Waits for the other side to close; sends a byte now and then until it does. What it said."""
    made.settimeout(0.1)
    said, until, left = b"", time.monotonic() + 30, iter(drops)
    while time.monotonic() < until:
        with suppress(TimeoutError):
            part = made.recv(2**16)
            if not part:
                return said
            said += part
            continue
        if drops:
            try:
                made.send(bytes([next(left)]))
            except OSError:
                return said
    raise AssertionError("the connection is still open")


def test_a_connection_that_asks_nothing_is_closed(impatient):
    """At once or drop by drop, at first or after an answer, or beside a body that nobody waits for."""
    host = f"Host: {impatient.host}\r\n"
    with impatient.connect() as silent, impatient.connect() as slow, impatient.connect() as second:
        second.sendall(f"GET /api/bank HTTP/1.1\r\n{host}\r\n".encode())
        assert answered(second).status == 200
        assert closed(slow, f"GET / HTTP/1.1\r\n{host}X: ".encode() + b"x" * 1000) == b""
        assert closed(silent) == b""
        assert closed(second) == b""
    with impatient.connect() as refused:
        refused.sendall(f"POST /api/runs HTTP/1.1\r\n{host}Content-Length: 100000\r\n\r\n".encode())
        assert closed(refused, b"x" * 1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_comes_too_slowly_is_refused(impatient):
    with impatient.connect() as made:
        made.sendall(f"POST /api/runs HTTP/1.1\r\nHost: {impatient.host}\r\nContent-Length: 900\r\n\r\n".encode())
        said = closed(made, b" " * 1000)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"this request came too slowly: send it within 1 seconds" in said


@linux
def test_who_does_not_read_is_given_up_and_holds_no_memory(impatient):
    """Thousands of requests at once, and no answer is taken: 25 kB each."""
    for _ in range(50):
        assert impatient.ask("/openapi.json").status == 200
    before, files = impatient.rss, impatient.files
    request = f"GET /openapi.json HTTP/1.1\r\nHost: {impatient.host}\r\n\r\n".encode()
    held = [impatient.connect(receive=4096) for _ in range(4)]
    most = 0
    for made in held:
        made.setblocking(False)
    until = time.monotonic() + 30
    while held and time.monotonic() < until:
        for made in list(held):
            try:
                made.send(request * 100)
            except BlockingIOError:
                pass
            except ConnectionError:
                made.close()
                held.remove(made)
        most = max(most, impatient.rss)
        time.sleep(0.02)
    assert held == []
    assert most - before < 24 * 2**20  # of 200 MB that were asked for
    assert impatient.ask("/api/bank").status == 200
    assert impatient.files <= files + 1


def test_newcomers_to_a_crowd_are_told_to_come_back(impatient):
    """Those who are there are served; some more are told why not; others are cut off."""
    time.sleep(1.2)  # what earlier tests left open is closed
    crowd = [impatient.connect() for _ in range(6)]
    request = f"GET /api/bank HTTP/1.1\r\nHost: {impatient.host}\r\n\r\n".encode()
    try:
        with impatient.connect() as newcomer:
            newcomer.sendall(request)
            answer = answered(newcomer)
        assert (answer.status, answer.getheader("Retry-After")) == (503, "5")
        assert "come back in a moment" in sentence(answer)
        crowd[0].sendall(request)
        assert answered(crowd[0]).status == 200
        crowd += [impatient.connect() for _ in range(10)]
        with suppress(ConnectionError):
            assert crowd[-1].recv(1) == b""
    finally:
        for made in crowd:
            made.close()
    until = time.monotonic() + 30
    while impatient.ask("/api/bank").status != 200:
        assert time.monotonic() < until


def test_who_asks_too_often_is_told_when_to_ask_again():
    server = Serving(RATE=1.0, BURST=20, ADDRESSES=4)
    try:
        foreign = [server.ask("/api/bank", headers=[("Origin", "http://evil.example")]) for _ in range(30)]
        assert {answer.status for answer in foreign} == {403}  # and take nothing of what the visitor has
        answers = [server.ask(headers=[("X-Forwarded-For", f"10.0.0.{number}")]) for number in range(30)]
        assert [answer.status for answer in answers[:20]] == [200] * 20
        refused = [answer for answer in answers if answer.status == 429]
        assert len(refused) >= 5
        assert refused[0].getheader("Retry-After") == "1"
        assert "wait a moment" in sentence(refused[0])
        if sys.platform == "linux":
            assert server.ask(source="127.0.0.3").status == 200  # another address
        time.sleep(1)
        assert server.ask().status == 200
    finally:
        status, said = server.stop()
    assert (status, said) == (0, "")


def test_an_allowance_is_a_token_bucket():
    now = 0.0
    allowance = Allowance(rate=2, burst=5, most=3, clock=lambda: now)
    assert [allowance.take("a") for _ in range(7)] == [0] * 5 + [0.5] * 2
    now = 0.25
    assert allowance.take("a") == 0.25
    now = 0.5
    assert [allowance.take("a"), allowance.take("a")] == [0, 0.5]
    now = 100.0
    assert [allowance.take("a") for _ in range(6)] == [0] * 5 + [0.5]  # never more than at first
    assert allowance.take("b") == 0
    for number in range(100):
        allowance.take(str(number))
    assert len(allowance._left) == 3


def test_questions_that_wait_are_bounded():
    worker, held = Worker(questions=2), threading.Event()
    worker.ask(held.wait)
    until = time.monotonic() + 10
    while worker._questions:  # until the thread has begun to wait
        assert time.monotonic() < until
    waiting = [worker.ask(lambda: 1) for _ in range(2)]
    with pytest.raises(Busy, match="ask again in a moment"):
        worker.ask(lambda: 1)
    held.set()
    assert [answer.result(10) for answer in waiting] == [1, 1]
    assert worker.ask(lambda: 2).result(10) == 2
    assert worker.stop(10)


def test_broken_connections_leave_nothing_behind(server):
    """Torn down at every point: while asking, while being answered, with and without a word."""
    files = server.files if sys.platform == "linux" else None
    body = json.dumps({"steps": 50}).encode()
    name = json.loads(server.ask("/api/runs", "POST", body=body).text)["id"]
    request = f"GET /api/runs/{name}/steps HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode()
    for cut in range(0, len(request) + 1, 4):
        with server.connect() as made:
            made.sendall(request[:cut])
            if cut % 8:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of an end
    assert server.ask("/api/bank").status == 200
    if files is not None:
        until = time.monotonic() + 30
        while server.files > files:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_ctrl_c_ends_it_whatever_is_open():
    """Silent connections, halves of requests, streams that are read or not: it ends within seconds."""
    server = Serving(TASKS=20)
    head = f"HTTP/1.1\r\nHost: {server.host}\r\n"
    halves = ["", "GET", f"GET / {head}", f"POST /api/runs {head}Content-Length: 9\r\n\r\n{{", f"GET / {head}\r\nGET /"]
    body = json.dumps({"method": "els", "steps": 200}).encode()
    held = []
    for number in range(20):
        made = server.connect(receive=2048)
        made.sendall(halves[number % len(halves)].encode())
        held.append(made)
    for _ in range(10):
        name = json.loads(server.ask("/api/runs", "POST", body=body).text)["id"]
        made = server.connect(receive=2048)
        made.sendall(f"GET /api/runs/{name}/steps {head}\r\n".encode())
        held.append(made)
    made = server.connect(receive=2048)
    made.setblocking(False)
    with suppress(BlockingIOError):
        made.send(f"GET /openapi.json {head}\r\n".encode() * 700)
    assert held[-1].recv(17) == b"HTTP/1.1 200 OK\r\n"
    assert server.stop() == (0, "")
    for made in held:
        made.close()
