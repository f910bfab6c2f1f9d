"""The explorer's interface against its own description: schemathesis asks what `/openapi.json` allows and what it does
not, and checks every answer.

`GOLDDIFF_CASES=1000` asks so many things of each operation, other ones every time; a few, always the same, otherwise.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("fastapi", reason="the extra web is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from serving import Serving

CASES = os.environ.get("GOLDDIFF_CASES")
NOT_PROMISED = (
    "positive_data_acceptance",  # what single settings allow, their combination may not: that is a 422 with a sentence
    "use_after_free",  # DELETE ends a run; it is not gone
)


def test_every_operation_answers_as_it_is_described(tmp_path, cache):
    """Statuses, content types, headers and bodies, of right and of wrong requests, alone and one after the other."""
    server = Serving(RATE=1e6, BURST=1e6)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}openapi.json", "--checks", "all"]
    command += ["--exclude-checks", ",".join(NOT_PROMISED), "--max-examples", CASES or "25", "--no-color"]
    command += ["--continue-on-failure", *([] if CASES else ["--generation-deterministic"])]
    command += ["--report", "har", "--report-har-path", tmp_path / "asked.har"]
    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    ended = server.stop()
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert ended == (0, "")
    asked = json.loads((tmp_path / "asked.har").read_text())["log"]["entries"]
    good = Counter(operation(entry["request"]) for entry in asked if entry["response"]["status"] < 300)
    bad = Counter(operation(entry["request"]) for entry in asked if 400 <= entry["response"]["status"] < 500)
    known = {
        "POST /api/runs", "GET /api/runs/id", "DELETE /api/runs/id", "GET /api/runs/id/steps", "GET /api/runs/id/exact",
        "GET /api/runs/id/steps/i/sources", "GET /api/runs/id/steps/i/pixels/y/x", "GET /api/bank",
        "GET /api/rows/i.png",
    }  # fmt: skip
    late = {name for name in known if re.search("exact|sources|pixels", name)}  # want a run that was followed before
    assert (known if CASES else known - late) <= set(good)  # the others were seen to do their work
    assert known - {"GET /api/bank"} <= set(bad)  # and to refuse
    for entry in asked:
        assert str(cache) not in entry["response"]["content"].get("text", "")  # no place on the disk is told
    print(f"{len(asked)} requests, {sum(good.values())} granted, {sum(bad.values())} refused")


def operation(request):
    """`GET http://127.0.0.1:80/api/rows/7.png?x` -> `GET /api/rows/i.png`."""
    path = re.sub(r"^https?://[^/]+|\?.*$", "", request["url"])
    path = re.sub(r"/rows/[^/]+$", "/rows/i.png", re.sub(r"/runs/[^/]+", "/runs/id", path))
    path = re.sub(r"/steps/[^/]+/", "/steps/i/", re.sub(r"/pixels/[^/]+/[^/]+$", "/pixels/y/x", path))
    return f"{request['method']} {path}"
