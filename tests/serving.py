"""`golddiff serve` in a process of its own, and raw requests to it."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

START = """
import sys
from golddiff.explorer import limits
for name, value in {}.items():
    assert hasattr(limits, name)
    setattr(limits, name, value)
from golddiff.cli import main
sys.exit(main())
"""


class Serving:
    """A server of 300 digits, by default with the limits that all have.

    Arguments:
        arguments: of the command. limits: names of `golddiff.explorer.limits`, and what they are instead.
    """

    def __init__(self, *arguments, **limits):
        command = [sys.executable, "-c", START.format(limits), "serve", "digits", "--limit", "300", "--port", "0"]
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=self.said, text=True)
        self.lines = [self.process.stdout.readline() for _ in range(3)]
        self.address = self.lines[0].split()[-1]
        self.port = int(re.search(r":(\d+)/", self.address)[1])
        self.host = f"127.0.0.1:{self.port}"

    def connect(self, source="127.0.0.1", receive=None, patience=30):
        made = socket.socket()
        made.settimeout(patience)
        if receive:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.bind((source, 0))
        made.connect(("127.0.0.1", self.port))
        return made

    def raw(self, request, method="GET", **connection):
        """The answer to bytes; its content is read, and is its `text`."""
        with self.connect(**connection) as made:
            made.sendall(request)
            return answered(made, method)

    def ask(self, target="/", method="GET", host=None, body=None, headers=(), **connection):
        """The answer to a request whose parts are sent as they are."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host if host is None else host}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body is not None:
            lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
        return self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""), method, **connection)

    @property
    def rss(self):
        """Bytes of memory that are its own; the files that it maps do not count."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    @property
    def files(self):
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self):
        """Ends it as Ctrl-C does: its exit status, and what it said of errors."""
        try:
            self.process.send_signal(signal.SIGINT)
            status = self.process.wait(30)
            self.said.seek(0)
            return status, self.said.read().decode()
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.said.close()


def answered(made, method="GET"):
    """The answer that comes from a socket; None if it was closed without one."""
    answer = http.client.HTTPResponse(made, method=method)
    with suppress(ConnectionError, http.client.RemoteDisconnected):
        answer.begin()
        answer.text = answer.read().decode("latin-1")
        return answer
    return None


def sentence(answer):
    """What a refusal says."""
    detail = json.loads(answer.text)["detail"]
    assert len(detail.split()) > 2
    return detail
