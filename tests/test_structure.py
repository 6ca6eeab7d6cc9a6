"""The floors: a module imports only from floors below its own, never in a circle, and only the study room knows Optuna
and MLflow."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "basisadapt"
# Rooms from the ground up; a room may import from every floor below, and from itself.
FLOORS = [
    {"errors", "peft_hook"},
    {"command", "registry", "ranges", "settings", "environment", "cost", "diagnostics"},
    {"phi", "tasks", "backbones", "distributed"},
    {"testing", "adapter", "mt_bench"},
    {"methods", "observation"},
    {"run_config"},
    {"trainer"},
    {"training"},
    {"execution"},
    {"study"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


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


def test_no_circles():
    """Module by module, imports for type checking included; a package's `__init__` is its public face, no module."""
    modules = {
        ".".join(("basisadapt", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in PACKAGE.rglob("*.py")
    }
    by_path = {path: name for name, path in modules.items()}
    left = {name: set() for name in modules}
    for path, _, module in imports():
        left[by_path[path]] |= {module, module.rpartition(".")[0]} & (modules.keys() - {by_path[path]})
    while free := [name for name, needs in left.items() if not needs]:
        left = {name: needs - set(free) for name, needs in left.items() if name not in free}
    assert left == {}


def test_only_the_study_room_knows_optuna_and_mlflow():
    for path, room, module in imports():
        if module.split(".")[0] in ("optuna", "mlflow"):
            assert room == "study", path
