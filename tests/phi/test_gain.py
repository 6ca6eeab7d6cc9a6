"""The gains that are not a number of the settings, and the roughness of φ."""

from __future__ import annotations

import pytest
import torch

from basisadapt.phi.bank import POINTS_PER_FUNCTION, TransferBank, _at_once, root_mean_squares
from basisadapt.phi.settings import PhiSettings
from basisadapt.testing import MODULES


def bank_with(**settings):
    torch.manual_seed(0)
    return TransferBank(PhiSettings(**{"num_basis": 6, "amplitude_init": "normal:0.5", **settings}), MODULES).double()


def pairs():
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator) for shape in ((3, 8), (9, 3))] for _ in MODULES]
    return [(A.double(), B.double()) for A, B in drawn]


def test_the_size_of_BA_is_known_without_BA():
    truth = [(B @ A).square().mean().sqrt() for A, B in pairs()]
    torch.testing.assert_close(root_mean_squares(pairs()), torch.stack(truth))


def test_stacked_as_one_by_one():
    """As on a GPU; of two shapes and dtypes, in turn."""
    mixed = [pair for one in pairs() for pair in (one, (one[0][:, :5].float(), one[1].float()))]
    torch.testing.assert_close(_at_once(mixed), root_mean_squares(mixed), rtol=1e-14, atol=0)


def test_a_learned_gain_starts_where_it_is_told_and_trains_in_every_module():
    bank = bank_with(gain="learned:5")
    torch.testing.assert_close(bank.gains(pairs()), torch.full((len(MODULES),), 5.0, dtype=torch.float64))
    bank.gains(pairs()).sum().backward()
    torch.testing.assert_close(bank.log_gain.grad, torch.full((len(MODULES),), 5.0, dtype=torch.float64))
    with_gain, without = (sum(table.numel() for table in one.parameters()) for one in (bank, bank_with()))
    assert with_gain == without + len(MODULES)


@pytest.mark.parametrize("path", [True, False])
def test_a_normalised_gain_makes_the_update_as_large_as_BA(path):
    """F(c BA) = c F(BA): φ sees BA at one size, however far training has come."""
    bank = bank_with(gain="normalised:2", identity_path=path, centre=True)
    name = MODULES[0].name
    A, B = pairs()[0]

    def update(scale):
        gain = bank.gains([(A, scale * B)])[0]
        return bank.transfer(name, gain)(scale * B @ A)

    assert bank.gains([(A, B)])[0] * (B @ A).square().mean().sqrt() == pytest.approx(2.0)
    torch.testing.assert_close(update(1e-3), 1e-3 * update(1.0))
    assert not bank.gains([(A.requires_grad_(), B)]).requires_grad


def test_a_normalised_gain_is_finite_where_BA_is_zero():
    bank = bank_with(gain="normalised:2", centre=True)
    gain = bank.gains([(A, 0 * B) for A, B in pairs()])
    assert bank.transfer(MODULES[0].name, gain[0])(torch.zeros(2, 2, dtype=torch.float64)).eq(0).all()


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_roughness_is_the_mean_square_of_the_second_derivative(sharing):
    bank = bank_with(sharing=sharing, basis="gaussian_rbf")
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64, requires_grad=True)
    found = []
    for module in MODULES:
        phi = bank.transfer(module.name, x.new_ones(())).phi(x)
        (slope,) = torch.autograd.grad(phi.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
        found.append(second.square().mean())
    truth = torch.stack(found).mean().item()
    assert POINTS_PER_FUNCTION * bank.alpha.shape[1] > 40
    assert bank.roughness().item() == pytest.approx(truth, rel=0.05)  # differences, at some fifty points
