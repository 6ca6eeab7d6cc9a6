"""The embedded task: which standard-library package does a docstring come from?

Its texts are real English that every Python installation includes, so there is nothing to download or to license. The
rows differ slightly between Python versions, and so does the recorded fingerprint of the data.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from basisadapt.core.cache import kept
from basisadapt.tasks.split import split
from basisadapt.tasks.task import Rows, TaskData
from basisadapt.tasks.text import TextTask

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}
MINIMUM = 40  # characters: shorter docstrings carry too little information


class Docstrings(TextTask, name="docstrings"):
    """Ten classes: the ten standard-library packages with the most docstrings. One row in five is held out."""

    headline = "accuracy"
    num_labels = 10

    def check(self, data_dir: Path | None) -> None:
        """Nothing to check: Python includes the data."""

    def load(self, data_dir: Path | None) -> TaskData:
        """The docstrings of the ten packages with the most; a repeated text counts once, for its first package."""
        texts: dict[str, str] = {}
        for package, text in _docstrings(Path(sysconfig.get_path("stdlib"))):
            texts.setdefault(text, package)
        sizes = Counter(texts.values())
        packages = sorted(sorted(sizes, key=lambda package: (-sizes[package], package))[: self.num_labels])
        chosen = [text for text in texts if texts[text] in packages]
        rows = Rows(chosen, [packages.index(texts[text]) for text in chosen])
        return TaskData(*split(rows), classes=tuple(packages))

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The accuracy of `scores` (rows, 10) against class indices `labels` (rows,)."""
        return {"accuracy": float(np.mean(scores.argmax(axis=-1) == labels))}


def _docstrings(library: Path) -> list[tuple[str, str]]:
    """Package and docstring of every module, class and function in the library's packages, in a fixed order.

    The result is cached until the library changes.
    """
    files = list(_files(library))
    stamps = ((str(path), stat.st_size, stat.st_mtime_ns) for _, path in files for stat in [path.stat()])
    digest = hashlib.sha256(json.dumps([sys.version, *stamps]).encode()).hexdigest()[:16]

    def parse() -> list[tuple[str, str]]:
        return [(package, text) for package, path in files for text in _file_docstrings(path)]

    return [(package, text) for package, text in kept(f"docstrings-{digest}.json", parse)]


def _files(library: Path) -> Iterator[tuple[str, Path]]:
    """Every package's name with each of its files, in sorted order."""
    for package in sorted(path for path in library.iterdir() if (path / "__init__.py").is_file()):
        if package.name in SKIPPED:
            continue
        for path in sorted(package.rglob("*.py")):
            if SKIPPED.isdisjoint(path.relative_to(library).parts):
                yield package.name, path


def _file_docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= MINIMUM:
                yield text
