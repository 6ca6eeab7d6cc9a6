"""Run a program that uses peft alone, such as lm-eval: `python -m basisadapt.launch lm_eval ARGUMENTS`."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence

from basisadapt.core.command import BAD_INPUT, Parser, print_error
from basisadapt.core.errors import InputError
from basisadapt.core.registry import load_plugin

EXAMPLES = """\
Examples:
  python -m basisadapt.launch lm_eval --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks arc_easy
  accelerate launch -m basisadapt.launch lm_eval ...      on several GPUs; torchrun: --module basisadapt.launch

A program that imports basisadapt itself needs none of this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Register our methods with peft, then run a module in this process, as `python -m` does.

    Returns 2, the exit code of bad input, if the module or a plug-in cannot be found. Otherwise the module ends as it
    does alone.
    """
    try:
        options = _parser().parse_args(arguments)
        for plugin in options.plugin:
            load_plugin(plugin)
        _check_runs(options.module)
    except InputError as error:
        print_error(error)
        return BAD_INPUT
    sys.argv[1:] = options.arguments  # run_module replaces the first by the module's file
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m basisadapt.launch",
        description="Run a Python module as `python -m MODULE` does, with peft able to load this package's adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_plugins(
        "a Python file or module with the basis, grid or sharing policy that an adapter was trained with"
    )
    parser.add_argument("module", metavar="MODULE", help="the module to run, such as lm_eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the module's own arguments")
    return parser


def _check_runs(module: str) -> None:
    """Raise InputError unless there is such a module, with a main program if it is a package."""
    try:
        main = importlib.util.find_spec(module)
        if main is not None and main.submodule_search_locations is not None:
            main = importlib.util.find_spec(f"{module}.__main__")
    except (ImportError, ValueError) as error:  # of a package above it
        raise InputError(f"module {module!r} cannot be run: {error}") from error
    if main is None:
        raise InputError(f"module {module!r} cannot be run: there is none of that name, or it has no __main__")


if __name__ == "__main__":
    sys.exit(main())
