"""The pages say what is so: their Python runs, their commands parse, their links lead somewhere, the site builds."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

import golddiff as gd
from golddiff.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from examples import alike, blocks, run  # noqa: E402 - the path comes first

PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("**/*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
RUNNING = [page for page in PAGES if any(b.language == "python" and not b.skipped for b in blocks(page))]
HUB = {"https", "mailto"}


def name(page):
    return str(page.relative_to(ROOT))


# ---- Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_python_on_the_pages_runs(page, tmp_path, monkeypatch):
    for package in ("sklearn", "mlxtend"):
        pytest.importorskip(package, reason="the extra demo is not there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOLDDIFF_DATA", raising=False)  # pages need nothing but what is built in
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_seen(page):
    """No fence that the runner would not read, and no mark with a name that nobody has."""
    fences = re.findall(r"^[ \t]*(?:`{3,}|~{3,}).*$", page.read_text(), re.M)
    plain = [fence for fence in fences if re.fullmatch(r"```(\w+|\{(toctree|commands|include)\}.*)?", fence)]
    assert fences == plain
    assert sum(bool(re.fullmatch(r"```\w+", fence)) for fence in fences) == len(blocks(page))
    for needed in re.findall(r"<!-- needs: (.*?) -->", page.read_text()):
        assert set(needed.split(", ")) <= {"deepinv", "torchvision", "diffusers", "fastapi", "matplotlib"}


def test_examples_are_read_and_compared(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 2\nprint(x + 0.5, 'cats')\n```\n\n```text\n2.51 cats\n```\n\n"
        "<!-- skip: it never ends -->\n```python\nwhile True: pass\n```\n\n```sh\nls\n```\n"
        "<!-- needs: torch, no_such_package -->\n```python\n1 / 0\n```\n"
        "<!-- needs: torch -->\n```python\nx += 1\n```\n"
    )
    first, printed, skipped, shell, missing, there = blocks(page)
    assert (first.prints, printed.language, skipped.skipped, shell.language) == ("2.51 cats\n", "text", True, "sh")
    assert (missing.skipped, there.skipped) == (True, False)
    assert first.line == 2
    run(page)
    page.write_text(page.read_text().replace("2.51", "2.6"))
    with pytest.raises(AssertionError, match="line 2 prints\n2.5 cats"):
        run(page)
    assert not alike("2 cats", "2 cats more")


# ---- commands ----------------------------------------------------------------------------------------


def commands(text):
    """The golddiff commands of a page's `sh` and indented blocks: their words after `golddiff`."""
    shell = [m[1] for m in re.finditer(r"^```sh\n(.*?)^```$", text, re.M | re.S)]
    shell += re.findall(r"(?:^ {4}\S.*\n(?: {5,}.*\n)*)+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    for block in shell:
        block = block.replace("\\\n", " ")
        for variable, first in re.findall(r"for (\w+) in (\S+)", block):
            block = block.replace(f"${variable}", first)
        for line in block.splitlines():
            for part in re.split(r"[;|]|&&|\bdo\b", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    continue  # prose in an indented list
                starts = [i for i, word in enumerate(words) if word == "golddiff" or word.endswith("bin/golddiff")]
                if starts and (starts[0] == 0 or words[0] in ("torchrun", "srun")):
                    yield words[starts[0] + 1 :]


def parse(words):
    """Parses a command line without running it; click or golddiff complains if it is none."""
    command, path = app, ["golddiff"]
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, f"{' '.join(path)} has no command {words[0]}"
        command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
    command.make_context(" ".join(path), list(words))


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p.read_text()))], ids=name)
def test_commands_on_the_pages_are_commands(page):
    for words in commands(page.read_text()):
        parse(words)


def test_commands_are_found_and_checked():
    text = "```sh\nfor m in a b; do golddiff sample mnist --method $m; done\nsrun -n 2 golddiff doctor  # it\n```\n"
    assert list(commands(text)) == [["sample", "mnist", "--method", "a"], ["doctor"]]
    parse(["sample", "mnist5k", "--steps", "3"])
    for wrong in (["sample", "mnist5k", "--stepps", "3"], ["sample", "x", "--method", "goldif"]):
        with pytest.raises((click.UsageError, gd.GolddiffError)):
            parse(wrong)
    with pytest.raises(AssertionError, match="no command"):
        parse(["sampel", "mnist5k"])
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 20


# ---- links -------------------------------------------------------------------------------------------


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.split(":")[0] in HUB:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} is not there"
        assert there.is_relative_to(ROOT), f"{target} is outside of the repository"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


# ---- the site ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(package, reason="the extra docs is not there")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", out / "trees", DOCS, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def test_every_page_is_in_the_site(site):
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists()


def test_site_loads_nothing_from_outside(site):
    outside = r"[\"']?(?:https?:)?//"
    loads = rf"<(?:script|img|iframe|source|video|embed)[^>]*\bsrc={outside}|<link[^>]*\bhref={outside}"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not re.search(loads, page.read_text()), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", sheet.read_text()), sheet.name
    assert not re.search(loads, '<script src="local.js"></script><a href="https://x.org">')
    assert re.search(loads, '<script async src="https://cdn.org/a.js">')
    assert re.search(loads, '<link rel="stylesheet" href="//cdn.org/a.css">')


def test_formulas_are_mathml(site):
    for page in ("mathematics.html", "notation.html", "api/noise.html"):
        text = (site / page).read_text()
        assert text.count("<math ") > 3
        assert not re.search(r"<script[^>]*mathjax", text, re.I)
        assert r"\frac" not in text
        assert "$" not in re.sub(r"<(script|pre)\b.*?</\1>", "", text, flags=re.S)


def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    documented = {n for role, names in inventory.items() if role.startswith("py:") for n in names}
    for public in gd.__all__:
        thing = getattr(gd, public)
        assert f"{thing.__module__}.{thing.__qualname__}" in documented, public


def test_every_command_is_in_the_site(site):
    text = (site / "commands.html").read_text()
    for command in ("sample", "bank build", "compare", "oracle train", "doctor"):
        assert f">golddiff {command}<" in text
    assert "--save-steps" in text


# ---- citation ----------------------------------------------------------------------------------------

KEYS = {  # of the Citation File Format 1.2.0
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
    "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "title", "type", "url", "version",
}  # fmt: skip
PERSON = {"affiliation", "alias", "email", "family-names", "given-names", "name-particle", "name-suffix", "orcid"}


def test_citation_is_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert KEYS >= cited.keys() >= {"authors", "cff-version", "message", "title"}
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "MIT")
    assert cited["version"] == gd.__version__
    assert cited["authors"] == [{"name": "The golddiff authors"}]
    for reference in cited["references"]:
        assert reference.keys() >= {"authors", "title", "type"}
        assert all(author.keys() <= PERSON for author in reference["authors"])
        (identifier,) = reference["identifiers"]
        assert identifier["type"] == "other"
        number = re.fullmatch(r"arXiv:(\d{4}\.\d{5})", identifier["value"])[1]
        assert number in (DOCS / "mathematics.md").read_text()


def test_extras_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    for extra, wanted in project["optional-dependencies"].items():
        for package in (re.match(r"[\w-]+", want)[0].lower() for want in wanted):
            assert package in pinned | {"golddiff"}, f"{package} of the extra {extra} has no pin in constraints.txt"
