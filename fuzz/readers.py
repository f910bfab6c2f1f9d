"""Fuzzes the readers, led by coverage (atheris, extra `fuzz`).

    python fuzz/readers.py png --seconds 600 --inputs 100000
    python fuzz/readers.py all --seconds 600 --inputs 100000

A target ends after so many inputs or seconds, whichever comes first. A finding is another exception than
`GolddiffError`, an input that takes more than 5 s, more than 3 GiB of memory, a crash of native code, a file written
outside of the scratch folder, or anything run. Its input is kept in `--out` and the work goes on. The last line for
each target says what was done; the exit status is 1 if there were findings.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLOWEST = 5  # seconds for one input
MEMORY = 3072  # MiB
LONGEST = 8192  # bytes of an input
INSTRUMENTED = [
    "golddiff.images", "golddiff.foreign", "golddiff.recipe", "golddiff.locality", "golddiff.prepare", "PIL", "zipfile",
    "tarfile", "gzip", "yaml", "json", "numpy.lib",
]  # fmt: skip


def main() -> int:
    """Runs the targets, each in processes of its own."""
    parser = argparse.ArgumentParser(description="Fuzzes the readers of golddiff.")
    parser.add_argument("target", help="a target, or all")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where findings go")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside is not None:
        inside(chosen.target, chosen.inside)
        return 0
    from targets import TARGETS

    if chosen.target not in (*TARGETS, "all"):
        parser.error(f"known targets are {', '.join(TARGETS)} and all")
    names = list(TARGETS) if chosen.target == "all" else [chosen.target]
    return int(sum([campaign(name, chosen.seconds, chosen.inputs, chosen.out) for name in names]) > 0)


def campaign(name: str, seconds: int, inputs: int, out: Path) -> int:
    """Fuzzes one target; the number of findings. A process ends with each finding, and the next one goes on."""
    found = out.resolve() / name
    found.mkdir(parents=True, exist_ok=True)
    before = len(list(found.iterdir()))
    done, peak, begun = 0, 0, time.monotonic()
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        while done < inputs and (left := seconds - (time.monotonic() - begun)) >= 1:
            options = [
                f"-runs={inputs - done}", f"-max_total_time={int(left)}", f"-timeout={SLOWEST}",
                f"-rss_limit_mb={MEMORY}", f"-max_len={LONGEST}", f"-artifact_prefix={found}/", "-print_final_stats=1",
            ]  # fmt: skip
            command = [sys.executable, "-B", __file__, name, "--inside", *options, scratch]
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace")  # noqa: S603
            units = _stated("number_of_executed_units", ended.stderr)
            done, peak = done + units, max(peak, _stated("peak_rss_mb", ended.stderr))
            if ended.returncode:
                (found / f"log-{time.time_ns()}.txt").write_text(ended.stdout[-4000:] + ended.stderr[-12000:])
            if units == 0:
                raise SystemExit(f"{name} does not begin: see the log in {found}")
    findings = len(list(found.iterdir())) - before
    taken = time.monotonic() - begun
    print(f"{name}: {done} inputs, {taken:.0f} s, {findings // 2} findings, peak {peak} MiB", flush=True)
    return findings


def _stated(name: str, said: str) -> int:
    match = re.findall(rf"stat::{name}:\s*(\d+)", said)
    return int(match[-1]) if match else 0


def inside(name: str, options: list[str]) -> None:
    """Runs libFuzzer on a target; does not come back."""
    import atheris

    scratch = Path(options[-1])
    os.environ["GOLDDIFF_CACHE"] = str(scratch / "cache")
    os.environ.pop("GOLDDIFF_DATA", None)
    with atheris.instrument_imports(include=INSTRUMENTED):
        import targets
    bank = scratch / "bank"
    if bank.exists():
        os.environ["GOLDDIFF_FUZZ_BANK"] = str(bank)
    else:
        targets.prepare_bank(bank)
    corpus = scratch / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, data in enumerate(targets.seeds(name)):
        (corpus / f"seed{i}").write_bytes(data)
    work = scratch / "work" / "in"

    def test(data: bytes) -> None:
        targets.attempt(name, data, work)

    with targets.without_checksums():
        atheris.Setup([sys.argv[0], *options[:-1], str(corpus)], test)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
