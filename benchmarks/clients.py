"""Many clients of `golddiff serve` at once: what they are answered, how long that takes, and the server's memory.

    python benchmarks/clients.py                          # 200 clients for a minute, from one address
    python benchmarks/clients.py --addresses 200          # each from an address of its own, so none is asked to wait
    python benchmarks/clients.py --clients 40 --seconds 5

Each opens the page, starts runs and follows them, looks at sources, thumbnails and pixels of the steps, cancels, and
leaves in the middle: all over loopback, to a server in a process of its own. Fails unless every answer is what was
asked for or a refusal with a sentence, memory is flat after the first third, the server answers afterwards, nothing
stays open, and Ctrl-C ends it with silence in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

PAGE = ["", *(f"page/{path.name}" for path in Path(__file__).parents[1].glob("src/golddiff/explorer/page/*.[jc]s*"))]
GRANTED = (200, 201, 204, 303, 304)
POLITE = (410, 429, 503)  # a forgotten run, too much, too many; with a sentence each
METHODS = ("golddiff", "pca", "optimal", "wiener", "ls")
PATIENCE = 60.0  # seconds after which an answer counts as lost
FLAT = 8 * 2**20  # bytes that the server may take more in the last third than in the one before


class Log:
    """What all clients saw."""

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []
        self.left = self.finished = self.again = 0

    def answer(self, what: str, status: int, body: bytes, seconds: float) -> None:
        self.answers[status] += 1
        if status in GRANTED:
            self.seconds[what].append(seconds)
        elif status not in POLITE or len(json.loads(body)["detail"].split()) < 5:
            self.wrong.append(f"{what}: {status} {body[:200]!r}")


class Client:
    """One browser: a connection for questions, and another for each run that is followed."""

    def __init__(self, port: int, source: str, seed: int, log: Log) -> None:
        self.port, self.source, self.log, self.random = port, source, log, random.Random(seed)  # noqa: S311
        self.open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def use(self, until: float) -> None:
        """Visits until the time is over."""
        while time.monotonic() < until:
            try:
                await self.visit(until)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self.log.wrong.append(f"{type(error).__name__}: {error}")
            self.leave()
            await self.think()

    async def think(self) -> None:
        await asyncio.sleep(self.random.uniform(0.05, 0.6))

    def leave(self) -> None:
        if self.open:
            self.open[1].close()
        self.open = None

    async def visit(self, until: float) -> None:
        """Opens the page and makes some runs."""
        for path in PAGE:
            await self.ask("page", path)
        status, info = await self.ask("bank", "api/bank")
        while status == 200 and self.random.random() < 0.75 and time.monotonic() < until:
            settings = {"method": self.random.choice(METHODS), "seed": self.random.randrange(1000)}
            settings |= {"steps": self.random.randint(2, 20)}
            if self.random.random() < 0.2:
                settings["without"] = {"rows": self.random.sample(range(info["rows"]), 3)}
            made, run = await self.ask("run", "api/runs", "POST", settings)
            if made == 201:
                await self.watch(run["id"], settings["method"])
            await self.think()

    async def watch(self, name: str, method: str) -> None:
        """Follows a run, or leaves in the middle; then asks about its steps."""
        patience = self.random.choice((1, 3, 1000, 1000))
        done = 0
        async for event in self.follow(f"api/runs/{name}/steps"):
            done += event["kind"] == "step"
            self.log.finished += event["kind"] == "end"
            if done >= patience:
                self.log.left += 1
                break
        for _ in range(self.random.randint(0, 3) if done else 0):
            step = f"api/runs/{name}/steps/{self.random.randrange(done)}"
            y, x = self.random.randrange(8), self.random.randrange(8)
            if method == "wiener":
                break
            await self.ask("pixel", f"{step}/pixels/{y}/{x}")
            status, found = await self.ask("sources", f"{step}/sources" + self.random.choice(("", "?every=true")))
            for source in found["rows"][:8] if status == 200 else ():
                await self.ask("thumbnail", f"api/rows/{source['row']}.png")
            await self.think()
        if self.random.random() < 0.3:
            await self.ask("cancel", f"api/runs/{name}", "DELETE")

    async def ask(self, what: str, path: str, method: str = "GET", body: object = None) -> tuple[int, dict]:
        """The answer, decoded if it is JSON; waits a moment after a refusal, as it asks for."""
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            try:
                status, headers, content = await self.answered(path, method, body)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                if self.fresh or getattr(error, "partial", b""):
                    raise
                self.log.again += 1  # the server ended a connection that lay idle, just then; as a browser, ask again
                self.leave()
                status, headers, content = await self.answered(path, method, body)
        self.log.answer(what, status, content, time.monotonic() - began)
        if headers.get("connection") == "close":
            self.leave()
        if status in (429, 503):
            await asyncio.sleep(min(5, int(headers["retry-after"])) * self.random.uniform(1, 2))
        decoded = json.loads(content) if headers.get("content-type") == "application/json" else {}
        return status, decoded

    async def answered(self, path: str, method: str, body: object) -> tuple[int, dict[str, str], bytes]:
        self.fresh = self.open is None or self.open[0].at_eof()
        if self.open is None or self.fresh:
            self.open = await self.connected()
        reader, writer = self.open
        status, headers = await sent(reader, writer, self.port, path, method, body)
        return status, headers, await reader.readexactly(int(headers.get("content-length", 0)))

    async def follow(self, path: str) -> AsyncIterator[dict]:
        """The lines of a run, over a connection of their own."""
        began = time.monotonic()
        reader, writer = await self.connected()
        try:
            status, headers = await asyncio.wait_for(sent(reader, writer, self.port, path), PATIENCE)
            if status != 200:
                content = await reader.readexactly(int(headers["content-length"]))
                self.log.answer("first line", status, content, 0)
                return
            first, rest = True, b""
            async for part in chunks(reader):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if first:
                        self.log.answer("first line", 200, b"", time.monotonic() - began)
                    first = False
                    yield json.loads(line)
        finally:
            writer.close()

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(self.source, 0), limit=2**22)


async def sent(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    port: int,
    path: str,
    method: str = "GET",
    body: object = None,
) -> tuple[int, dict[str, str]]:
    """Sends a request; status and headers of its answer."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} /{path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in lines if line)
    return int(first.split()[1]), {name.lower(): value for name, value in pairs}


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of an answer whose length is not known before."""
    while size := int(await asyncio.wait_for(reader.readline(), PATIENCE), 16):
        yield await reader.readexactly(size)
        await reader.readline()
    await reader.readline()


class Server:
    """`golddiff serve digits` in a process of its own."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "golddiff", "serve", "digits", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self.process.stdout.readline())
        assert found, "the server did not start"
        self.port = int(found[1])

    @property
    def memory(self) -> int:
        """Bytes that it holds, those of mapped files included."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024  # type: ignore[index]

    @property
    def files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(30)
        self.log.seek(0)
        return status, self.log.read().decode()


async def load(server: Server, clients: int, addresses: int, seconds: float) -> tuple[Log, list[int]]:
    """All clients at once; what they saw, and the memory of the server at each second."""
    log, until = Log(), time.monotonic() + seconds
    some = [
        Client(server.port, f"127.0.{n % addresses // 250}.{n % addresses % 250 + 1}", n, log) for n in range(clients)
    ]
    using = [asyncio.create_task(client.use(until)) for client in some]
    memory = [server.memory]
    while not all(task.done() for task in using):
        await asyncio.sleep(1)
        memory.append(server.memory)
    await asyncio.gather(*using)
    return log, memory


async def alone(server: Server) -> str:
    """How a run of one client ends."""
    log = Log()
    client = Client(server.port, "127.0.0.1", 0, log)
    made, until = 0, time.monotonic() + PATIENCE
    while made != 201 and time.monotonic() < until:  # the crowd's allowance comes back
        made, run = await client.ask("run", "api/runs", "POST", {"steps": 3})
    events = [event async for event in client.follow(f"api/runs/{run['id']}/steps")]
    client.leave()
    assert log.wrong == []
    return events[-1]["state"]


def slope(memory: list[int]) -> float:
    """MiB a minute, by least squares, after the first third."""
    later = memory[len(memory) // 3 :]
    return statistics.linear_regression(range(len(later)), later).slope * 60 / 2**20


def report(log: Log, memory: list[int]) -> None:
    total = sum(log.answers.values())
    print(f"{total} answers: " + ", ".join(f"{count} x {status}" for status, count in sorted(log.answers.items())))
    print(
        f"{log.finished} runs followed to their end, {log.left} left in the middle; {log.again} questions asked again"
    )
    for what, seconds in sorted(log.seconds.items()):
        ordered = sorted(seconds)
        last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] * 1e3
        middle = statistics.median(ordered) * 1e3
        print(f"{what:>12}: {len(ordered):6} granted, median {middle:7.1f} ms, 99 % within {last:7.1f} ms")
    tenths = [memory[(len(memory) - 1) * tenth // 10] / 2**20 for tenth in range(11)]
    print("memory at each tenth of the time, MiB: " + " ".join(f"{mib:.0f}" for mib in tenths))
    print(f"memory after the first third: {slope(memory):+.2f} MiB a minute")


def check(server: Server, log: Log, memory: list[int], files: int) -> None:
    """Fails if anything is not as it is promised."""
    assert log.wrong == [], f"{len(log.wrong)} wrong: {log.wrong[:5]}"
    assert log.finished
    third = len(memory) // 3
    grown = statistics.mean(memory[2 * third :]) - statistics.mean(memory[third : 2 * third])
    assert grown < FLAT, f"memory grows: {grown / 2**20:.1f} MiB from the second third to the last"
    assert asyncio.run(alone(server)) == "finished"
    until = time.monotonic() + PATIENCE
    while server.files > files and time.monotonic() < until:
        time.sleep(0.1)
    assert server.files <= files, f"{server.files - files} files stay open"
    assert server.stop() == (0, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--addresses", type=int, default=1, help="From so many addresses of loopback.")
    parser.add_argument("--seconds", type=float, default=60)
    chosen = parser.parse_args()
    server = Server()
    try:
        assert asyncio.run(alone(server)) == "finished"
        files = server.files
        log, memory = asyncio.run(load(server, chosen.clients, chosen.addresses, chosen.seconds))
        report(log, memory)
        check(server, log, memory, files)
    finally:
        with suppress(ProcessLookupError):
            server.process.kill()


if __name__ == "__main__":
    main()
