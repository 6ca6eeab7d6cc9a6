"""The contract suite over every registry: whatever is registered is tested, or the suite fails."""

from __future__ import annotations

import pytest
import torch

from basisadapt import GridStrategy, InputError, SharingPolicy, TransferBasis
from basisadapt.core.ranges import Range
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.sharing import SHARING
from basisadapt.testing import check_basis, check_grid, check_sharing


@pytest.mark.parametrize("name", sorted(BASES))
def test_basis(name):
    check_basis(name)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grid(name):
    check_grid(name)


@pytest.mark.parametrize("name", sorted(SHARING))
def test_sharing(name):
    check_sharing(name)


def test_the_paper_is_complete():
    assert {"sinc", "gaussian_rbf", "bspline", "fourier", "polynomial"} <= set(BASES)
    assert {"uniform", "chebyshev", "learned", "random"} <= set(GRIDS)
    assert {"none", "x", "omega", "alpha", "all", "kind"} <= set(SHARING)


# A search that goes on in its database needs the ranges that it started with.
RANGES = {
    "fourier": {"omega_init": Range(0.3, 30.0, log=True)},
    "polynomial": {
        "omega_init": Range(0.1, 2.0, log=True),
        "gain": Range(1.0, 30.0, log=True),
        "num_basis": Range(4, 16, log=True),
    },
    "sinusoid": {"omega_init": Range(10.0, 1000.0, log=True)},
    "learned": {"transfer_lr": Range(0.01, 3.0, log=True)},
    "all": {"transfer_lr": Range(0.003, 3.0, log=True)},
}


@pytest.mark.parametrize("registry", [BASES, GRIDS, SHARING], ids=lambda registry: registry.kind)
def test_where_a_search_looks(registry):
    ours = {name: registry[name].search for name in registry if registry[name].__module__.startswith("basisadapt.")}
    assert ours == {name: RANGES.get(name, {}) for name in ours}


@pytest.mark.parametrize("kind", [TransferBasis, GridStrategy, SharingPolicy])
def test_a_plugin_without_its_function_is_refused(kind):
    class Empty(kind):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_a_module_may_be_a_group_of_its_own():
    class Each(SharingPolicy):
        def group(self, parameter, module):
            return module

    check_sharing(Each)


class _Shape(TransferBasis):
    def forward(self, u):
        return u.flatten()


class _Sum(TransferBasis):
    def forward(self, u):
        return u.sum()


class _Number(TransferBasis):
    def forward(self, u):
        return 3


class _Detached(TransferBasis):
    def forward(self, u):
        return u * torch.exp(-u.detach().square())


class _Batch(TransferBasis):
    def forward(self, u):
        return torch.exp(-((u - u.mean()) ** 2))


class _Infinite(TransferBasis):
    def forward(self, u):
        return 1 / u


class _Dtype(TransferBasis):
    def forward(self, u):
        return torch.exp(-u.float().square())


class _Kink(TransferBasis):
    def forward(self, u):
        return torch.where(u < 0.31, u, u + 1)


@pytest.mark.parametrize(
    ("basis", "part"),
    [
        (_Shape, "shape"),
        (_Sum, r"^_Sum.forward: shape \(\) for input \(25,\)$"),
        (_Number, r"^_Number.forward gives a int, expected a tensor$"),
        (_Detached, "gradients"),
        (_Batch, "input|elementwise"),
        (_Infinite, "finite"),
        (_Dtype, "float"),
        (_Kink, "rise"),
    ],
)
def test_broken_bases_are_caught(basis, part):
    with pytest.raises(AssertionError, match=part):
        check_basis(basis)


def test_broken_grids_are_caught():
    class Outside(GridStrategy):
        def points(self, num, interval, generator):
            return 2 * interval * torch.arange(num, dtype=torch.float64)

    class Unseeded(GridStrategy):
        def points(self, num, interval, generator):
            return interval * torch.rand(num, dtype=torch.float64)

    class Listed(GridStrategy):
        def points(self, num, interval, generator):
            return [interval * i / num for i in range(num)]

    for grid in (Outside, Unseeded, Listed):
        with pytest.raises(AssertionError):
            check_grid(grid)


def test_broken_sharing_is_caught():
    class Counter(SharingPolicy):
        calls = 0

        def group(self, parameter, module):
            self.calls += 1
            return self.calls

    with pytest.raises(AssertionError, match="two answers"):
        check_sharing(Counter)


def test_a_taken_name_is_refused():
    with pytest.raises(InputError, match="already exists"):

        class Again(TransferBasis, name="sinc"):
            def forward(self, u):
                return u


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="did you mean 'shifted'"):

        class Wrong(TransferBasis, name="wrong", argument="shiftet"):
            def forward(self, u):
                return u

    assert "wrong" not in BASES
