"""Whether a bill of materials is true: python tests/check_sbom.py build/sbom.json (Python's own library is enough).

Everything that golddiff asks for is in it; all that is in it has the version of constraints.txt and a licence.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    """`{name: version}` of a file of constraints."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def asked():
    """`{name: lowest version}` of what users install: the base dependencies and the extra `all`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = re.search(r"\[(.*)\]", extras["all"][0])[1].split(",")
    said = project["dependencies"] + [text for name in names for text in extras[name]]
    return {
        normal(name): lowest for name, lowest in (re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups() for text in said)
    }


def check(bill):
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "golddiff"
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"], "it would differ from run to run"
    found = {normal(part["name"]): part["version"].partition("+")[0] for part in bill["components"]}
    assert asked().keys() <= found.keys(), f"not named: {asked().keys() - found.keys()}"
    known = pins("constraints.txt")
    wrong = {name: version for name, version in found.items() if known.get(name) != version}
    assert not wrong, f"not as pinned in constraints.txt: {wrong}"
    unsaid = [part["name"] for part in bill["components"] if not part.get("licenses")]
    assert not unsaid, f"no licence is stated for {unsaid}"
    assert str(ROOT) not in json.dumps(bill), "it names folders of this machine"
    return len(found)


if __name__ == "__main__":
    print(f"{check(json.loads(Path(sys.argv[1]).read_text()))} parts, all pinned, all with a licence")
