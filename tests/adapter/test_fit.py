"""What φ(BA) is found to capture of a given update."""

from __future__ import annotations

import pytest
import torch

from basisadapt.adapter import fit
from basisadapt.adapter.fit import fitted_energy
from basisadapt.diagnostics.spectrum import captured, singular_values
from basisadapt.spectra import formulations

RANK = 3
PHI, SINE = formulations(RANK)


def gaussian(rows=40, columns=56, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def optimum(update, rank=RANK):
    return captured(singular_values(update))[rank - 1].item()


@pytest.mark.parametrize("settings", [PHI, SINE])
def test_of_a_flat_spectrum_a_nonlinearity_captures_more_than_ba_of_a_greater_rank(settings, monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 50)
    update = gaussian()
    assert fitted_energy(update, settings) > optimum(update, RANK + 2)


def test_of_an_update_of_low_rank_everything_is_captured_at_the_start(monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 1)
    low = gaussian()[:, :RANK] @ gaussian(seed=1)[:RANK]
    assert fitted_energy(low, PHI) == pytest.approx(1, abs=1e-6)
    assert fitted_energy(gaussian(), PHI) == pytest.approx(optimum(gaussian()), abs=1e-6), "the optimum of BA"


def test_the_size_of_an_update_does_not_matter(monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 20)
    shares = [fitted_energy(size * gaussian(), PHI) for size in (1.0, 1e-9, 1e9)]
    assert shares[0] > optimum(gaussian()) + 0.01
    assert shares[1:] == pytest.approx([shares[0]] * 2, rel=1e-4)
    assert fitted_energy(torch.zeros(8, 9), PHI) == 0


def test_the_sine_against_a_plain_one(monkeypatch):
    """BA + a sin(ω g BA) / g, g = 1 / rms(BA) a constant to the gradient; Adam as written, in float64."""
    monkeypatch.setattr(fit, "STEPS", 25)
    monkeypatch.setattr(fit, "RATE", 3e-3)  # of larger steps rounding decides
    T = gaussian() / gaussian().square().mean().sqrt()
    U, sigma, Vt = torch.linalg.svd(T, full_matrices=False)
    A, B = sigma[:RANK, None].sqrt() * Vt[:RANK], U[:, :RANK] * sigma[:RANK].sqrt()
    tensors = [A.requires_grad_(), B.requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)]
    moments, best = [(torch.zeros_like(t), torch.zeros_like(t)) for t in tensors], 0.0
    for step in range(25):
        z = tensors[1] @ tensors[0]
        g = 1 / z.detach().square().mean().sqrt()
        loss = (z + tensors[2] * torch.sin(30 * g * z) / g - T).square().mean()
        best = max(best, 1 - loss.item())
        gradients = torch.autograd.grad(loss, tensors)
        with torch.no_grad():
            for t, gradient, (first, second) in zip(tensors, gradients, moments, strict=True):
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                size = second.div(1 - 0.999 ** (step + 1)).sqrt() + 1e-8
                t -= 3e-3 * (1 - step * (1 - 1 / 25) / 25) * first / (1 - 0.9 ** (step + 1)) / size
    assert best > optimum(T) + 0.005
    assert fitted_energy(T, SINE) == pytest.approx(best, rel=1e-3)


def test_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 2)
    before = torch.get_rng_state()
    first, second = (fitted_energy(gaussian(), PHI) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
