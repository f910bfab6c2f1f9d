"""Many clients at once (`benchmarks/clients.py`): every answer is what was asked for or a polite refusal, and memory
stays flat.

`GOLDDIFF_CLIENTS=200` is that many clients for a minute; 40 for some seconds otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra web is not installed")

CLIENTS = os.environ.get("GOLDDIFF_CLIENTS")
LOAD = Path(__file__).parents[1] / "benchmarks" / "clients.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and uses many addresses of loopback")
@pytest.mark.parametrize("addresses", ["1", CLIENTS] if CLIENTS else ["40"])  # from one, they are often told to wait
def test_many_clients_at_once(addresses):
    size = ["--clients", CLIENTS or "40", "--seconds", "60" if CLIENTS else "5", "--addresses", addresses]
    done = subprocess.run([sys.executable, LOAD, *size], capture_output=True, text=True)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
