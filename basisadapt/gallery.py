"""Plot bases, including your own: `python -m basisadapt.gallery FILE [BASIS ...] --plugin my_bases.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from basisadapt.core.command import DONE, Parser, guarded
from basisadapt.core.errors import InputError, one_line
from basisadapt.core.registry import load_plugin
from basisadapt.diagnostics.figures import Curve, bases_figure

FORMATS = (".png", ".svg", ".pdf")
FURTHEST, POINTS = 4.0, 801
ARGUMENTS = {"shifted": "u = ω (x − xᵢ)", "phase": "u = ω x + xᵢ", "scaled": "u = ω x"}


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    _draw(options.file, options.bases, options.plugin)
    return DONE


def _parser() -> Parser:
    parser = Parser(
        prog="python -m basisadapt.gallery", description=f"Draw the functions b(u) of bases for |u| up to {FURTHEST:g}."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=f"the picture: {', '.join(FORMATS)}")
    parser.add_argument("bases", nargs="*", metavar="BASIS", help="a registered basis (default: all)")
    parser.add_plugins("a Python file or module with more bases")
    return parser


def _draw(file: Path, names: Sequence[str], plugins: Sequence[str]) -> None:
    from basisadapt.phi.basis import BASES

    if file.suffix not in FORMATS:
        raise InputError(f"a picture's name ends in {', '.join(FORMATS)}, got {str(file)!r}")
    if not file.parent.is_dir():
        raise InputError(f"folder {str(file.parent)!r} does not exist")
    for plugin in plugins:
        load_plugin(plugin)
    names = names or list(BASES)
    bases_figure({f"{name},  {ARGUMENTS[BASES[name].argument]}": _curve(name) for name in names}).savefig(file)


def _curve(name: str) -> Curve:
    import torch

    from basisadapt.phi.basis import BASES

    u = torch.linspace(-FURTHEST, FURTHEST, POINTS, dtype=torch.float64)
    try:
        return {"u": u.tolist(), "b": BASES[name]().forward(u).tolist()}
    except Exception as error:  # a user's code
        raise InputError(f"basis {name!r} cannot be drawn: {one_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
