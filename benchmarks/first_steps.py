"""How long a user waits: for `import golddiff` beside `import torch`, and for the first step on the explorer's page.

    python benchmarks/first_steps.py digits cifar10

Imports: medians of fresh processes, in turn. Page: a fresh server for each bank (built before), from the request of a
run to the first step received; masks are kept with the bank, or made anew with `--cold`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request

import golddiff as gd

RUNS = 7


def import_seconds(module: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - began


def first_step_seconds(source: str, limit: int | None) -> tuple[float, float]:
    """Seconds from starting the server to its address, and from asking for a run to its first step."""
    command = [sys.executable, "-m", "golddiff", "serve", source, "--port", "0"]
    began = time.perf_counter()
    command += ["--limit", str(limit)] if limit else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = re.search(r"http://\S+", server.stdout.readline())[0]  # type: ignore[index]
    up = time.perf_counter() - began
    try:
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address}api/runs", b"{}", headers)  # noqa: S310 - our own server
        with urllib.request.urlopen(asked) as answer:  # noqa: S310
            name = json.load(answer)["id"]
        with urllib.request.urlopen(f"{address}api/runs/{name}/steps") as lines:  # noqa: S310
            while json.loads(next(lines))["kind"] != "step":
                pass
        return up, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", nargs="*", default=["digits"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--cold", action="store_true", help="Remove masks and statistics of the banks first.")
    chosen = parser.parse_args()
    pairs = [(import_seconds("torch"), import_seconds("golddiff")) for _ in range(RUNS)]
    torch_seconds, our_seconds = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import torch {torch_seconds:.2f} s, golddiff {our_seconds:.2f} s: {our_seconds / torch_seconds:.2f} times")
    for source in chosen.sources:
        bank = gd.Bank.build(source, limit=chosen.limit)
        if chosen.cold and bank.path is not None:
            for file in (bank.path / "derived").glob("*"):
                if "spectrum" not in file.name:  # made with the bank
                    file.unlink()
        up, first = first_step_seconds(source, chosen.limit)
        print(f"{source} ({len(bank)} images): server up in {up:.1f} s, first step {first:.2f} s after it is asked for")


if __name__ == "__main__":
    main()
