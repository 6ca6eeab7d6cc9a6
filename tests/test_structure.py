"""The floors: a module imports only from floors below its own, never in a circle, and only the study room knows Optuna
and MLflow. The package is quick to import, and what the text says of it and its dependencies is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import basisadapt

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "basisadapt"
# Rooms from the ground up; a room may import from every floor below, and from itself.
FLOORS = [
    {"cache", "errors", "peft_hook", "redaction"},
    {"command", "registry", "ranges", "settings", "environment", "cost"},
    {"phi", "tasks", "backbones", "distributed", "diagnostics"},
    {"testing", "adapter", "mt_bench", "gallery", "launch"},
    {"methods", "spectra"},
    {"run_config", "observation"},
    {"trainer"},
    {"training"},
    {"execution"},
    {"study"},
    {"__main__"},
]
HEAVY = {"torch", "transformers", "peft", "datasets", "mlflow", "optuna", "matplotlib", "pandas", "scipy", "sklearn"}
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# The same within basisadapt/study.
STUDY_LAYERS = [
    {"outcome", "statistics"},  # what became of a cell, and arithmetic
    {"plan"},  # what shall run
    {"record", "report"},  # what has run, and what is said of it: neither knows the other
    {"drive"},  # what runs it
    {"__main__", "result"},  # from the command line, and from Python
]


def imports():
    """(file, room, imported module, or what is taken from one) of every import, also those inside functions."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from ((path, room, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((path, room, alias.name) for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "py.typed"} == set(LEVEL)


def test_no_arrow_points_upward():
    for path, room, module in imports():
        if module.startswith("basisadapt.") and room != "__init__":
            target = module.split(".")[1]
            if target in LEVEL and target != room:
                assert LEVEL[target] < LEVEL[room], f"{path.name} in {room} imports {module}"


def test_the_rooms_of_a_study_have_walls():
    """A report is made of outcomes, wherever they come from; a plan of nothing that has run."""
    study = PACKAGE / "study"
    level = {room: level for level, rooms in enumerate(STUDY_LAYERS) for room in rooms}
    assert {path.name.removesuffix(".py") for path in study.iterdir()} - {"__init__", "__pycache__"} == set(level)
    found = set()
    for path, _, module in imports():
        if study in path.parents and module.startswith("basisadapt.study."):
            room, target = path.relative_to(study).parts[0].removesuffix(".py"), module.split(".")[2]
            if room not in ("__init__", target):
                assert level[target] < level[room], f"{path.name} in study/{room} imports {module}"
                found.add((room, target))
    assert {("drive", "record"), ("drive", "report"), ("record", "plan"), ("report", "plan")} <= found


def module_graph(faces=False):
    """Module to the modules that it imports, for type checking included; with `faces`, of packages themselves too."""
    modules = {
        ".".join(("basisadapt", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in PACKAGE.rglob("*.py")
    }
    if faces:
        modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    by_path = {path: name for name, path in modules.items()}
    graph = {name: set() for name in modules}
    for path, _, module in imports():
        graph[by_path[path]] |= {module, module.rpartition(".")[0]} & (modules.keys() - {by_path[path]})
    return graph


def shortest_way(start, end):
    """The modules from one to the other, each importing the next; the package's own face is none of them."""
    graph, ways = module_graph(faces=True), {start: [start]}
    for module in (queue := [start]):
        for target in sorted(graph[module] - ways.keys() - {"basisadapt"}):
            ways[target] = [*ways[module], target]
            queue.append(target)
    return ways[end]


def picture():
    """The rooms as a Mermaid graph: an arrow for each import that no longer way implies, and the shortest way from
    command to kernel, module by module."""
    below = {room: set() for room in LEVEL}
    for _, room, module in imports():
        if room in LEVEL and module.startswith("basisadapt."):
            below[room] |= {module.split(".")[1]} & (LEVEL.keys() - {room})
    reached = {}
    for room in sorted(LEVEL, key=LEVEL.get):
        reached[room] = below[room].union(*(reached[target] for target in below[room]))
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(LEVEL, key=lambda room: (-LEVEL[room], room)):
        implied = set().union(*(reached[target] for target in below[room]))
        if direct := sorted(below[room] - implied):
            lines.append(f"    {room} --> {' & '.join(direct)}")
    way = shortest_way("basisadapt.study.__main__", "basisadapt.phi.kernels")
    names = (module.removeprefix("basisadapt.").replace(".__main__", "") for module in way)
    path = " → ".join(f"`{name}`" for name in names)
    return "\n".join([*lines, "```", "", f"From command to kernel, by the fewest imports: {path}."])


def test_contributing_shows_the_rooms_as_they_are():
    """`python -m tests.test_structure` prints what belongs there."""
    assert picture() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_no_circles():
    left = module_graph()
    while free := [name for name, needs in left.items() if not needs]:
        left = {name: needs - set(free) for name, needs in left.items() if name not in free}
    assert left == {}


def test_only_the_study_room_knows_optuna_and_mlflow():
    for path, room, module in imports():
        if module.split(".")[0] in ("optuna", "mlflow"):
            assert room == "study", path


@pytest.mark.parametrize("name", ["basisadapt", "basisadapt.study"])
def test_importing_the_package_is_quick_and_light(name):
    """Best of three: the machine may be busy."""
    program = (
        f"import time\nstart = time.perf_counter()\nimport {name}\nseconds = time.perf_counter() - start\n"
        "import sys\nassert not HEAVY & sys.modules.keys(), HEAVY & sys.modules.keys()\nprint(seconds)"
    ).replace("HEAVY", str(HEAVY))
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=60) for _ in range(3)]
    assert not any(run.returncode for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 0.5


def test_every_public_module_may_be_the_first_that_is_imported():
    """peft's import is followed by that of our methods, from within whichever module asks for peft first."""
    program = """
import importlib, os, sys, traceback
import torch, transformers  # shared by all children; peft is each one's own
assert "peft" not in sys.modules
wrong = []
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        wrong.append(name)
sys.exit(" ".join(wrong) or 0)
"""
    names = sorted({*basisadapt._PUBLIC.values(), "basisadapt.methods", "basisadapt.methods.product"})
    run = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr


def requirements():
    """Name to lowest version, of what the core and the lab depend on; and the names in all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lowest = dict(re.split(">=|,", line)[:2] for line in [*project["dependencies"], *extras["lab"]])
    names = {re.match(r"[\w.-]+", line)[0] for lines in extras.values() for line in lines}
    return lowest, names - {"basisadapt"}


def test_the_lowest_versions_are_those_of_pyproject():
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    assert dict(line.split("==") for line in lines if not line.startswith("#")) == requirements()[0]


def test_the_licence_of_every_direct_dependency_is_listed():
    lowest, extras = requirements()
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n| licence | packages |")[2]
    assert sorted(re.findall("`(.+?)`", table)) == sorted({*lowest, *extras})


if __name__ == "__main__":
    print(picture())
