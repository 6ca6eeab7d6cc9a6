"""Bases and grids against the formulas of section 3.3, Tables 13 and 14, written out again in numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from basisadapt.core.errors import InputError
from basisadapt.phi.bank import ONE, Transfer, TransferBank, inverse_softplus
from basisadapt.phi.basis import BASES, width
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.settings import PhiSettings
from basisadapt.phi.sharing import SHARING, AdaptedModule, rows

CUBIC = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
FORMULAS = {
    "sinc": lambda x, w, g: np.sinc(w * (x - g)),
    "gaussian_rbf": lambda x, w, g: np.exp(-((w * (x - g)) ** 2)),
    "bspline": lambda x, w, g: np.nan_to_num(CUBIC(w * (x - g))),
    "fourier": lambda x, w, g: np.cos(w * x + g),
    "polynomial": lambda x, w, g: (1 + w * x) ** 3,
    "sinusoid": lambda x, w, g: np.sin(w * x),
    "linear": lambda x, w, g: w * x,
}
numbers = st.floats(-20, 20, allow_nan=False)


@pytest.mark.parametrize("name", FORMULAS)
@given(x=numbers, omega=st.floats(0.01, 10), grid=st.floats(-3, 3))
def test_basis_formula(name, x, omega, grid):
    found = BASES[name]()(*(torch.tensor(v, dtype=torch.float64) for v in (x, omega, grid)))
    assert found.item() == pytest.approx(FORMULAS[name](x, omega, grid), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("linear", 8), ("sinusoid", 1), ("gaussian_rbf", np.sqrt(np.e / 2))])
def test_width(name, expected):
    assert width(BASES[name]) == pytest.approx(expected, rel=1e-5)


def test_phi_is_the_sum():
    rng = np.random.default_rng(0)
    alpha, omega, grid, x = rng.normal(size=50), rng.uniform(0.1, 3, 50), rng.uniform(-3, 3, 50), rng.normal(size=9)
    transfer = Transfer(BASES["sinc"](), *(torch.from_numpy(v) for v in (alpha, omega, grid)))
    expected = (alpha * np.sinc(omega * (x[:, None] - grid))).sum(1)
    np.testing.assert_allclose(transfer.phi(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)


def test_centre_and_gain():
    rng = np.random.default_rng(0)
    parameters = [torch.from_numpy(rng.uniform(0.5, 1, 5)) for _ in range(3)]
    plain = Transfer(BASES["gaussian_rbf"](), *parameters)
    z = torch.linspace(-1, 1, 7, dtype=torch.float64)
    f = Transfer(plain.basis, *parameters, gain=torch.tensor(3.0), centre=True)
    torch.testing.assert_close(f(z), (plain.phi(3 * z) - plain.phi(torch.zeros(1, dtype=torch.float64))) / 3)


def points(name, num, interval=3.0):
    return GRIDS[name]().points(num, interval, torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("name", ["uniform", "learned", "chebyshev"])
def test_a_single_point_lies_in_the_middle(name):
    np.testing.assert_allclose(points(name, 1), [0.0], atol=1e-12)


@pytest.mark.parametrize("num", [2, 32, 50])
def test_grid_formulas(num):
    i = np.arange(num)
    np.testing.assert_allclose(points("uniform", num), -3 + 2 * 3 * i / (num - 1), atol=1e-12)
    np.testing.assert_allclose(points("learned", num), points("uniform", num))
    np.testing.assert_allclose(points("chebyshev", num), 3 * np.cos(np.pi * (2 * (i + 1) - 1) / (2 * num)), atol=1e-12)


def test_random_grid_is_uniform_on_the_interval():
    from scipy.stats import kstest

    sample = points("random", 4000, 2.0)
    assert kstest(sample, "uniform", args=(-2.0, 4.0)).pvalue > 0.01


MODULES = [
    AdaptedModule(f"{layer}.{kind}.{i}", kind, layer)
    for layer in range(3)
    for kind in ("attention", "mlp")
    for i in range(2)
]
TABLES = {  # rows of x, omega and alpha for 12 modules
    "none": (12, 12, 12),
    "x": (1, 12, 12),
    "omega": (12, 1, 12),
    "alpha": (12, 12, 1),
    "all": (1, 1, 1),
    "kind": (2, 2, 2),
    "layer": (3, 3, 3),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_sharing_counts(name):
    bank = TransferBank(PhiSettings(sharing=name, num_basis=4, grid="learned"), MODULES)
    found = tuple(len(table) for table in (bank.grid, bank.raw_omega, bank.alpha))
    assert found == TABLES[name]
    assert sum(table.numel() for table in bank.parameters()) == 4 * sum(found)
    assert len(set(rows(SHARING[name](), "alpha", MODULES))) == TABLES[name][2]


def test_a_module_outside_the_layers_shares_with_none():
    outside = [AdaptedModule(name, "mlp", None) for name in ("embeddings", "head")]
    assert rows(SHARING["layer"](), "alpha", [*MODULES, *outside]) == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4]


@pytest.mark.parametrize("name", ["omega", "alpha"])
def test_a_parameter_is_known_by_its_name_wherever_that_comes_from(name):
    composed = "".join(list(name))
    assert composed is not name
    assert set(rows(SHARING[name](), composed, MODULES)) == {0}


@pytest.mark.parametrize("omega", [1e-3, 0.1, 1.0, 8.17, 50.0, 500.0])
def test_omega_starts_at_omega0(omega):
    bank = TransferBank(PhiSettings(omega_init=omega, num_basis=3), MODULES[:1]).double()
    assert bank.transfer(MODULES[0].name, ONE).omega.tolist() == pytest.approx([omega] * 3, rel=1e-5)
    assert inverse_softplus(1.0) == pytest.approx(0.541, abs=1e-3)  # the paper's value, section 3.3


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ("none", [0.5, 0.5, 1.25, 1.25, 2.0, 2.0]),
        ("kind", [1.25, 1.25]),
        ("all", [1.25]),
        ("alpha", [0.5, 0.5, 1.25, 1.25, 2.0, 2.0]),
    ],
)
def test_omega_starts_linear_in_depth(sharing, expected):
    modules = [AdaptedModule(f"layer.{i}.{kind}", kind, i) for i in range(3) for kind in ("attention", "mlp")]
    bank = TransferBank(PhiSettings(omega_init="depth:0.5:2", num_basis=2, sharing=sharing), modules)
    found = torch.nn.functional.softplus(bank.raw_omega.double())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).unsqueeze(1).repeat(1, 2))


def test_a_depth_that_is_not_known_is_refused():
    modules = [AdaptedModule("layer.0", "mlp", 0), AdaptedModule("somewhere", "other", None)]
    with pytest.raises(InputError, match="'somewhere' is in none"):
        TransferBank(PhiSettings(omega_init="depth:0.5:2"), modules)


def test_jittered_grid_stays_within_a_tenth_of_the_spacing():
    generator = torch.Generator().manual_seed(0)
    uniform = GRIDS["uniform"]().points(50, 3.0, generator)
    noise = GRIDS["jittered"]().points(50, 3.0, generator) - uniform
    spacing = 6 / 49
    assert noise.abs().max() <= 0.1 * spacing * (1 + 1e-9)
    assert noise.abs().max() > 0.09 * spacing
    assert (noise[1:-1].abs() > 0).all()


def test_what_trains():
    def trainable(**settings):
        return {name for name, _ in TransferBank(PhiSettings(**settings), MODULES).named_parameters()}

    assert trainable() == {"alpha", "raw_omega"}
    assert trainable(learn_omega=False) == {"alpha"}
    assert trainable(grid="learned") == {"alpha", "raw_omega", "grid"}
    assert set(TransferBank(PhiSettings(learn_omega=False), MODULES).state_dict()) == {"alpha", "raw_omega", "grid"}


@pytest.mark.parametrize(("num", "spacing"), [(1, 4.0), (2, 4.0), (3, 2.0), (50, 4 / 49)])
def test_drawn_grids_by_their_draws(num, spacing):
    """A seed stands for the same grid in every version."""
    drawn = torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    np.testing.assert_allclose(points("random", num, 2.0), 4 * drawn - 2, atol=1e-12)
    moved = points("uniform", num, 2.0) + spacing * (0.2 * drawn - 0.1)
    np.testing.assert_allclose(points("jittered", num, 2.0), np.clip(moved, -2, 2), atol=1e-12)


def test_random_grids_differ_by_module_and_repeat_by_seed():
    def grid(seed):
        return TransferBank(PhiSettings(grid="random", grid_seed=seed), MODULES).grid

    assert torch.equal(grid(3), grid(3))
    assert not torch.equal(grid(3), grid(4))
    assert len({tuple(row.tolist()) for row in grid(3)}) == len(MODULES)


@pytest.mark.parametrize(("omega", "error"), [("nyquist", 0.2), (1.0, 1e-3)])
def test_identity_initialisation(omega, error):
    settings = PhiSettings(amplitude_init="identity", omega_init=omega)
    transfer = TransferBank(settings, MODULES).transfer(MODULES[0].name, ONE).double()
    x = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
    assert (transfer.phi(x) - x).abs().max() < error


@pytest.mark.parametrize("basis", ["gaussian_rbf", "sinc", "bspline"])
@pytest.mark.parametrize("omega", [1e4, 1e6])
def test_identity_initialisation_of_functions_narrower_than_its_points(basis, omega):
    """A function that no equally spaced point meets would get an amplitude of 1e155, or none."""
    settings = PhiSettings(basis=basis, grid="random", num_basis=3, amplitude_init="identity", omega_init=omega)
    bank = TransferBank(settings, MODULES)
    for module in MODULES:
        transfer = bank.transfer(module.name, ONE).double()
        assert (transfer.phi(transfer.grid) - transfer.grid).abs().max() < 1e-2 * settings.interval
        assert transfer.alpha.abs().max() < 2 * settings.interval
