"""The Markdown files: links, anchors and paths lead somewhere, commands are understood, the page of the registries is
up to date. The API reference is written without a warning and has every public module; its links lead somewhere too."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from basisadapt.methods import METHODS
from basisadapt.study import options as command_line
from basisadapt.study.plan.changes import split_changes
from basisadapt.study.plan.shipped import list_studies

ROOT = Path(__file__).parent.parent
FOLDERS = ["docs", "studies", "benchmarks"]
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_THEN = {"CHANGELOG.md", "log.md"}  # pages that tell what was: their paths were right at the time
FENCED = re.compile(r"^```.*?^```", flags=re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", flags=re.M)
NAME = re.compile(r"basisadapt(?:\.\w+)+")
PATH = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml|csv|toml|txt|yml))`")


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page):
    """The page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Of its headings, as GitHub and most renderers make them."""
    found = []
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return found


def links(page):
    return LINK.findall(CODE.sub("", prose(page)))


def dead_links(page, root=ROOT):
    """Those that lead to no file below `root`, or to no heading of it."""
    dead = []
    for link in links(page):
        address = urlsplit(link)
        target = (page.parent / unquote(address.path)).resolve() if address.path else page
        there = target.is_relative_to(root) and target.exists()
        if not address.scheme and not (
            there and (not address.fragment or unquote(address.fragment) in anchors(target))
        ):
            dead.append(link)
    return dead


@each(PAGES)
def test_every_link_leads_somewhere(page):
    assert dead_links(page) == []


def test_a_dead_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What φ is\n[a](#what-φ-is) [b](#what) [c](page.md) [d](none.md) [e](https://f.g) `[h](#i)`\n![j](k.png)"
    )
    assert dead_links(page, tmp_path) == ["#what", "none.md", "k.png"]
    assert len(links(ROOT / "README.md")) > 20, "those of the pages are found"


@each([page for page in GUIDES if page.name not in OF_THEN])
def test_every_path_exists(page):
    """Those in backticks, from the top of the repository or of the package."""
    tops = [ROOT, ROOT / "basisadapt"]
    missing = [path for path in PATH.findall(prose(page)) if not any((top / path).exists() for top in tops)]
    assert missing == []


def test_every_guide_is_in_the_contents():
    contents = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {page for page in GUIDES if ROOT / "docs" in page.parents} - contents == {ROOT / "docs" / "README.md"}


def python_names():
    """What the Python of a guide imports from this package, and the dotted names in its text."""
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "basisadapt":
                    yield from (f"{node.module}:{alias.name}" for alias in node.names)
        yield from (span[0] for span in map(NAME.match, CODE.findall(prose(page))) if span)
        yield from re.findall(r"python -m (basisadapt[\w.]*)", text)


def test_every_python_name_exists():
    names = set(python_names()) - {"basisadapt.plugins", "basisadapt.json"}  # the entry-point group, and a file
    assert len(names) > 15
    for name in sorted(names):
        pkgutil.resolve_name(name)


def commands():
    """Every command line of studies that a guide shows, with its page."""
    for page in GUIDES:
        blocks = FENCED.findall(page.read_text(encoding="utf-8"))
        for line in [*"\n".join(blocks).splitlines(), *CODE.findall(prose(page))]:
            _, found, arguments = line.partition("python -m basisadapt.study ")
            if found:
                yield pytest.param(shlex.split(arguments, comments=True), id=f"{page.name}: {arguments}")


@pytest.mark.parametrize("arguments", commands())
def test_a_command_shown_is_understood(arguments):
    options = command_line.make_parser().parse_args(arguments)
    command_line.check_together(options)
    split_changes(options.set)
    assert options.name is None or options.name in {*list_studies(), "NAME", "my_study.yaml"}


def test_every_option_is_in_a_guide():
    text = "".join(page.read_text(encoding="utf-8") for page in GUIDES)
    options = {option for action in command_line.make_parser()._actions for option in action.option_strings} - {"-h"}
    assert sorted(option for option in options if not re.search(rf"{option}\b", text)) == []


def test_the_page_of_features_is_up_to_date(monkeypatch, recwarn):
    """In this process: each feature is tried again, and a wrong number is an AssertionError."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    features = importlib.import_module("features")
    page = (ROOT / "docs" / "reference" / "features.md").read_text(encoding="utf-8")
    assert {"abba", "sinelora"} < set(features.methods()) < set(METHODS)
    assert page == f"{features.page(features.methods())}\n", "python .ci/features.py > docs/reference/features.md"


def test_the_page_of_the_registries_is_up_to_date():
    """A process of its own, in which no test has registered anything."""
    done = subprocess.run([sys.executable, ".ci/registries.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "reference" / "registries.md").read_text(encoding="utf-8")
    assert page == done.stdout, "python .ci/registries.py > docs/reference/registries.md"


class Addresses(HTMLParser):
    """The links of a page, and what they may lead to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if "id" in named:
            self.anchors.add(named["id"])
        if tag == "a" and "href" in named:
            self.links.append(named["href"])


@pytest.mark.slow
def test_every_public_module_has_a_page(tmp_path):
    pytest.importorskip("pdoc", reason="needs the extra `docs`")
    command = [sys.executable, ".ci/docs.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    modules = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "basisadapt").rglob("*.py")}
    public = {path.parent if path.name == "__init__" else path for path in modules if path.name != "__main__"}
    if find_spec("triton") is None:
        public -= {Path(f"basisadapt/phi/{name}_triton") for name in ("kernels", "cells", "graph")}
    pages = {page.relative_to(tmp_path).with_suffix("") for page in tmp_path.rglob("*.html")}
    assert pages == public | {Path("index")}
    page = (tmp_path / "basisadapt" / "phi" / "bases.html").read_text(encoding="utf-8")
    assert "B₃(u) = ((2 − |u|)₊³ − 4 (1 − |u|)₊³) / 6" in page
    read = {page: Addresses(page.read_text(encoding="utf-8")) for page in tmp_path.rglob("*.html")}
    dead = []
    for page, addresses in read.items():
        for link in addresses.links:
            address = urlsplit(link)
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not address.scheme and (target not in read or unquote(address.fragment) not in read[target].anchors):
                dead.append(f"{page.relative_to(tmp_path)}: {link}")
    assert dead == []
