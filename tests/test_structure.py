"""The layers: a module imports only from layers below its own, never in a circle, and only studies know Optuna and
MLflow. The package is quick to import, and what the text says of it and its dependencies is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import basisadapt
from basisadapt import training

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "basisadapt"
# Packages, and what is loose beside them, from the ground up: each may import from every layer below, and from itself.
LAYERS = [
    {"core"},
    {"phi", "tasks", "backbones", "diagnostics"},
    {"adapter", "testing", "mt_bench", "gallery", "launch"},
    {"methods", "spectra"},
    {"training"},
    {"study"},
    {"__main__"},
]
HEAVY = {"torch", "transformers", "peft", "datasets", "mlflow", "optuna", "matplotlib", "pandas", "scipy", "sklearn"}
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
# The same within packages: parts that lie in one layer know nothing of each other.
WITHIN = {
    "core": [
        {"cache", "errors", "grouping", "markup", "peft_hook", "redaction", "synonyms"},
        {"command", "registry", "ranges", "settings", "environment"},
    ],
    "training": [
        {"compiled", "cost", "distributed", "result"},  # arithmetic and processes
        {"config", "observation"},  # what decides a run's numbers, and what is seen of them
        {"data", "planning", "trainer"},  # its rows, its model, its optimiser
        {"loss_surface"},
        {"running"},  # one run
        {"execution"},  # where runs happen
        {"__main__"},
    ],
    "study": [
        {"outcome", "statistics"},  # what became of a cell, and arithmetic
        {"plan"},  # what shall run
        {"options", "record", "report"},  # what is asked for, what has run, what is said of it: none knows another
        {"drive"},  # what runs it
        {"__main__", "result"},  # from the command line, and from Python
    ],
}


def imports():
    """(file, package, imported module, or what is taken from one) of every import, also those inside functions."""
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from ((path, package, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((path, package, alias.name) for alias in node.names)


def parts_of(folder):
    """The packages and modules in a folder, without its own face."""
    return {path.name.removesuffix(".py") for path in folder.iterdir()} - {"__init__", "__pycache__", "py.typed"}


def test_every_package_has_a_layer():
    assert parts_of(PACKAGE) == set(LEVEL)


def test_no_arrow_points_upward():
    for path, package, module in imports():
        if module.startswith("basisadapt.") and package != "__init__":
            target = module.split(".")[1]
            if target in LEVEL and target != package:
                assert LEVEL[target] < LEVEL[package], f"{path.name} in {package} imports {module}"


@pytest.mark.parametrize(
    ("package", "seen"),
    [
        ("core", {("registry", "errors"), ("command", "redaction")}),
        ("training", {("execution", "running"), ("running", "trainer"), ("config", "distributed")}),
        # A report is made of outcomes, wherever they come from; a plan of nothing that has run.
        ("study", {("drive", "record"), ("drive", "report"), ("record", "plan"), ("report", "plan")}),
    ],
)
def test_the_parts_of_a_package_have_walls(package, seen):
    folder, found = PACKAGE / package, set()
    level = {part: level for level, parts in enumerate(WITHIN[package]) for part in parts}
    assert parts_of(folder) == set(level)
    for path, _, module in imports():
        if folder in path.parents and module.startswith(f"basisadapt.{package}."):
            part, target = path.relative_to(folder).parts[0].removesuffix(".py"), module.split(".")[2]
            if part not in ("__init__", target):
                assert level[target] < level[part], f"{path.name} in {package}/{part} imports {module}"
                found.add((part, target))
    assert seen <= found


def test_cost_and_processes_know_the_ground_alone():
    low = [PACKAGE / "training" / "cost.py", PACKAGE / "training" / "distributed"]
    for path, _, module in imports():
        if module.startswith("basisadapt.") and any(path.is_relative_to(part) for part in low):
            assert module.startswith(("basisadapt.core.", "basisadapt.training.distributed.")), (path, module)


def test_no_module_imports_what_its_own_package_offers_to_others():
    """It would be an arrow that no drawing shows."""
    modules = module_graph().keys()
    for path, _, module in imports():
        within = [parent.relative_to(PACKAGE.parent).parts for parent in path.parents if parent.is_relative_to(PACKAGE)]
        if path.name != "__init__.py" and module != "basisadapt.__version__":
            taken = module if module in modules else module.rpartition(".")[0]
            assert tuple(taken.split(".")) not in within, (path, module)


def module_graph():
    """Module to the modules that it imports, for type checking included; a package is its face."""
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    names = {path: ".".join(parts).removesuffix(".__init__") for path, parts in paths.items()}
    graph = {name: set() for name in names.values()}
    for path, _, module in imports():
        taken = module if module in graph else module.rpartition(".")[0]
        graph[names[path]] |= {taken} & (graph.keys() - {names[path]})
    return graph


def shortest_way(start, end):
    """The modules from one to the other, each importing the next; the package's own face is none of them."""
    graph, ways = module_graph(), {start: [start]}
    for module in (queue := [start]):
        for target in sorted(graph[module] - ways.keys() - {"basisadapt"}):
            ways[target] = [*ways[module], target]
            queue.append(target)
    return ways[end]


def picture():
    """The packages as a Mermaid graph: an arrow for each import that no longer way implies, and the shortest way from
    command to kernel, module by module."""
    below = {package: set() for package in LEVEL}
    for _, package, module in imports():
        if package in LEVEL and module.startswith("basisadapt."):
            below[package] |= {module.split(".")[1]} & (LEVEL.keys() - {package})
    reached = {}
    for package in sorted(LEVEL, key=LEVEL.get):
        reached[package] = below[package].union(*(reached[target] for target in below[package]))
    lines = ["```mermaid", "flowchart TD"]
    for package in sorted(LEVEL, key=lambda package: (-LEVEL[package], package)):
        implied = set().union(*(reached[target] for target in below[package]))
        if direct := sorted(below[package] - implied):
            lines.append(f"    {package} --> {' & '.join(direct)}")
    way = shortest_way("basisadapt.study.__main__", "basisadapt.phi.kernels")
    names = (module.removeprefix("basisadapt.").replace(".__main__", "") for module in way)
    path = " → ".join(f"`{name}`" for name in names)
    return "\n".join([*lines, "```", "", f"From command to kernel, by the fewest imports: {path}."])


def test_contributing_shows_the_packages_as_they_are():
    """`python -m tests.test_structure` prints what belongs there."""
    assert picture() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_no_circles():
    left = module_graph()
    while free := [name for name, needs in left.items() if not needs]:
        left = {name: needs - set(free) for name, needs in left.items() if name not in free}
    assert left == {}


def test_only_studies_know_optuna_and_mlflow():
    for path, package, module in imports():
        if module.split(".")[0] in ("optuna", "mlflow"):
            assert package == "study", path


@pytest.mark.parametrize("name", ["basisadapt", "basisadapt.training", "basisadapt.study"])
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
import accelerate, torch  # shared by all children; peft is each one's own
from transformers import PreTrainedModel
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
    names = sorted(
        {*basisadapt._PUBLIC.values(), *training._PUBLIC.values(), "basisadapt.methods", "basisadapt.methods.product"}
    )
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


def test_the_license_of_every_direct_dependency_is_listed():
    lowest, extras = requirements()
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n| license | packages |")[2]
    assert sorted(re.findall("`(.+?)`", table)) == sorted({*lowest, *extras})


if __name__ == "__main__":
    print(picture())
