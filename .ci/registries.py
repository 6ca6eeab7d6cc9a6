#!/usr/bin/env python3
"""Prints the page of everything that has a name: `python .ci/registries.py > docs/reference/registries.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from basisadapt.adapter.placement import PLACEMENTS
from basisadapt.backbones import BACKBONES, Backbone
from basisadapt.core.registry import Registry
from basisadapt.methods import METHODS
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.settings import PRESETS
from basisadapt.phi.sharing import SHARING
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies
from basisadapt.tasks import TASKS

HEAD = """\
# Everything that has a name

Generated from the registries, whose classes carry these descriptions:
`python .ci/registries.py > docs/reference/registries.md`. [Recipes](../../CONTRIBUTING.md#adding-things) add
to each."""
SECTIONS: list[tuple[str, str, str, Registry]] = [
    ("Bases", "adapter.basis", "basisadapt/phi/bases.py", BASES),
    ("Grids", "adapter.grid", "basisadapt/phi/grids.py", GRIDS),
    ("Sharing policies", "adapter.sharing", "basisadapt/phi/sharing.py", SHARING),
    ("Placements", "adapter.placement", "basisadapt/adapter/placement.py", PLACEMENTS),
    ("Methods", "method", "basisadapt/methods", METHODS),
    ("Tasks", "task", "basisadapt/tasks", TASKS),
]


def page() -> str:
    """The page, in Markdown."""
    described = (section(title, where, _of_registry(registry)) for title, *where, registry in SECTIONS)
    presets = section("Presets", ["adapter.preset", "basisadapt/phi/settings.py"], map(_preset, PRESETS))
    backbones = section("Backbones", ["backbone", "basisadapt/backbones/catalogue.py"], map(_backbone, BACKBONES))
    return "\n\n".join([HEAD, *described, backbones, presets, _studies()])


def section(title: str, where: Sequence[str], rows: Iterable[tuple[str, str]]) -> str:
    """A heading, how it is set and where it is defined, and a table of names with descriptions."""
    setting, path = where
    lines = [f"| `{name}` | {_cell(text)} |" for name, text in rows]
    return "\n".join(
        [f"## {title}", "", f"`--set {setting}=NAME`; [{path}](../../{path}).", "", "| name | |", "|---|---|", *lines]
    )


def _of_registry(registry: Registry) -> Iterable[tuple[str, str]]:
    return ((name, inspect.getdoc(registry[name]) or "") for name in registry)


def _preset(name: str) -> tuple[str, str]:
    return name, ", ".join(f"`{setting}: {value}`" for setting, value in PRESETS[name].items())


def _backbone(name: str) -> tuple[str, str]:
    backbone: Backbone = BACKBONES[name]
    origin = f"`{backbone.source}`" if backbone.package is None else f"`{backbone.package.install}`"
    return name, f"{backbone.shapes['model_type']}, from {origin}{backbone.note and f'; {backbone.note}'}"


def _studies() -> str:
    lines = [
        "## Studies",
        "",
        "`python -m basisadapt.study NAME`.",
        "",
        "| name | | published numbers |",
        "|---|---|---|",
    ]
    for name in list_studies():
        spec = read_spec(name)
        table = f"[{spec.answers.table}](../../studies/paper/{spec.answers.table})" if spec.answers else "-"
        lines.append(f"| [`{name}`](../../studies/{name}.yaml) | {_cell(spec.title)} | {table} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The first paragraph, as the cell of a table."""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", r"\|")


if __name__ == "__main__":
    print(page())
