#!/usr/bin/env python3
"""Changes the code in one place at a time and sees whether the tests notice: `pip install cosmic-ray`, then

    OMP_NUM_THREADS=1 python .ci/mutants.py                    every module below, every mutant
    OMP_NUM_THREADS=1 python .ci/mutants.py phi/series --sample 150 --seed 1

The changes are cosmic-ray's: other operators and comparisons, numbers one up and one down, conditions negated, loops
that do nothing, decorators removed. Those that alter annotations alone, or are no Python, do not count. Every mutant
runs in a fork of a process that has imported the libraries, and never touches a file. Printed are the figures of each
module and the survivors as diffs; the exit status is 1 where less than `--least` of a module's mutants were killed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

import hypothesis
import peft  # noqa: F401  for the forks, as SciPy
import pytest
import scipy.stats  # noqa: F401
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parent.parent
FORMULAS = ["tests/phi/test_formulas.py", "tests/test_contract.py"]
# Quick ones first; what takes long with many functions fails with few, too.
PATHS = [
    "tests/phi/test_series.py",
    "tests/phi/test_table.py",
    "tests/phi/test_numerics.py::test_the_matrices_of_a_series_are_numpys",
    "tests/phi/test_numerics.py::test_an_adapted_layer_is_finite",
    "tests/phi/test_weight.py",
    "tests/phi/test_evaluators.py",
    "-k=not [512 and not [50 and not narrow_peak_among_many",
]
WEIGHT = ["tests/phi/test_weight.py", "tests/phi/test_evaluators.py", "tests/phi/test_operators.py", PATHS[-1]]
TESTS = {
    "phi/bases": [*FORMULAS, *PATHS[:2]],
    "phi/basis": [*FORMULAS, "tests/adapter/test_wrong_inputs.py::test_a_basis_that_is_none"],
    "phi/grids": [*FORMULAS, "-k=not test_basis"],
    "phi/sharing": [*FORMULAS, "-k=not test_basis"],
    "phi/series": PATHS,
    "phi/kernels": WEIGHT,
    "phi/weight": WEIGHT,
    "phi/evaluators": PATHS,
    "phi/cubics": ["tests/phi/test_together.py", "tests/phi/test_operators.py", *PATHS],
    "phi/cubic_tables": ["tests/phi/test_together.py", *PATHS],
    "study/statistics": ["tests/study/test_statistics.py", "tests/study/test_law.py"],
}


def changes(source: str) -> list[tuple[Operator, int]]:
    """Every operator with the number of each place where it applies."""
    provider, nodes = OperatorProvider(), list(ast_nodes(get_ast(source)))
    operators = [provider[name]() for name in provider if not provider[name].arguments()]
    return [
        (operator, place)
        for operator in operators
        for place in range(sum(len(list(operator.mutation_positions(node))) for node in nodes))
    ]


def mutants(source: str, changes: list[tuple[Operator, int]]) -> Iterator[str]:
    """The source with each change by itself, where it differs from the source and from those before."""
    seen = {None, _meaning(source)}
    for operator, place in changes:
        mutant = mutate_code(source, operator, place)
        meaning = _meaning(mutant)
        if meaning not in seen:
            seen.add(meaning)
            yield mutant


def _meaning(source: str) -> str | None:
    """What the source does: its tree without annotations, which nothing evaluates; None if it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


class Replaced(SourceFileLoader):
    """Imports one module from other source than its file has."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        super().__init__(module, str(path))
        self._source = source

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The module, if it is the one."""
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        """What the source is compiled to."""
        return compile(self._source, self.path, "exec")


def passes(module: str, source: str, tests: list[str], seconds: float | None = None) -> bool | None:
    """Whether the tests pass with this source of the module; None if that took too long."""
    run = multiprocessing.get_context("fork").Process(target=_run, args=(module, source, tests))
    run.start()
    run.join(seconds)
    if run.exitcode is None:
        run.kill()
        run.join()
        return None
    return run.exitcode == 0


def _run(module: str, source: str, tests: list[str]) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.meta_path.insert(0, Replaced(f"basisadapt.{module.replace('/', '.')}", _path(module), source))
    os._exit(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:faulthandler", *tests]))


def _path(module: str) -> Path:
    return ROOT / "basisadapt" / f"{module}.py"


def check(module: str, sample: int | None, seed: int) -> float:
    """Run the mutants of one module and print what came of them; the share that was killed."""
    source, tests = _path(module).read_text(encoding="utf-8"), TESTS[module]
    start = time.monotonic()
    if not passes(module, source, tests):
        raise SystemExit(f"{module}: the tests fail without any change")
    patience = 10 + 5 * (time.monotonic() - start)
    drawn = changes(source)
    if sample is not None:
        random.Random(seed).shuffle(drawn)
    verdicts = []
    for mutant in itertools.islice(mutants(source, drawn), sample):
        verdicts.append(passes(module, mutant, tests, patience))
        if verdicts[-1]:
            lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), module, lineterm="", n=0)
            print(f"{module} #{len(verdicts)}", *list(lines)[2:], sep="\n", flush=True)
    survived, late = verdicts.count(True), verdicts.count(None)
    share = 1 - survived / len(verdicts)
    print(
        f"{module}: {len(verdicts)} mutants, {survived} survived, {late} timed out: {share:.1%} killed "
        f"in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return share


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--least", type=float, default=0.85, help="the share to be killed")
    options = parser.parse_args()
    if unknown := set(options.modules) - TESTS.keys():
        parser.error(f"unknown modules: {', '.join(sorted(unknown))}")

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # one counterexample is enough, however large
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    gc.freeze()  # a collection in a fork would copy all that it shares
    shares = [check(module, options.sample, options.seed) for module in options.modules or TESTS]
    sys.exit(min(shares) < options.least)


if __name__ == "__main__":
    main()
