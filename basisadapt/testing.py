"""Contract tests for plug-ins: `check_basis`, `check_grid`, `check_sharing`.

Each takes a registered name or a class, and raises AssertionError that names the part of the contract that failed. The
project's own tests run them on every registered class, so installed plug-ins are tested along with the built-in ones.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools

import torch
from torch import Tensor

from basisadapt.phi.bank import ONE, Transfer, TransferBank
from basisadapt.phi.basis import BASES, TransferBasis
from basisadapt.phi.choice import evaluator
from basisadapt.phi.grids import GRIDS, GridStrategy
from basisadapt.phi.settings import PhiSettings
from basisadapt.phi.sharing import SHARING, AdaptedModule, SharingPolicy, rows
from basisadapt.phi.weight import Execution, adapted_linear

COUNTS = (1, 8, 50)
MODULES = [AdaptedModule(f"layer.{i}.{kind}", kind, i) for i in range(2) for kind in ("attention", "mlp")]


def check_basis(basis: str | type[TransferBasis]) -> None:
    """Check a basis: shapes, finiteness, dtype and device, gradients, derivative, batching, and the fast path.

    Gradients in x, ω, α, grid points and gain are compared with finite differences in float64, and the layer built on
    the basis with plain autograd, through both evaluators. Raises AssertionError, or InputError for an unknown name.
    """
    cls = BASES[basis] if isinstance(basis, str) else basis
    instance = cls()
    _check_dtypes(instance)
    for count, grid in itertools.product(COUNTS, sorted(GRIDS)):
        _check_values(instance, _example(instance, count, grid))
    _check_gradients(_example(instance, 5, "uniform"))
    _check_derivative(_example(instance, 5, "uniform"))
    _check_layer(_example(instance, 8, "uniform"))
    for name in (name for name in BASES if BASES[name] is cls):
        check_state(PhiSettings(basis=name, num_basis=6, amplitude_init="normal:0.1"))


def _example(basis: TransferBasis, count: int, grid: str) -> Transfer:
    """A transfer function with random amplitudes and bandwidths, float64."""
    generator = torch.Generator().manual_seed(count)
    alpha = torch.randn(count, generator=generator, dtype=torch.float64)
    omega = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    gain = torch.tensor(2.0, dtype=torch.float64)
    return Transfer(basis, alpha, omega, GRIDS[grid]().points(count, 3.0, generator), gain, centre=True)


def _check_values(basis: TransferBasis, transfer: Transfer) -> None:
    name = type(basis).__name__
    grid = transfer.grid
    between = (grid[1:] + grid[:-1]) / 2
    x = torch.cat(
        [grid, between, torch.linspace(-10, 10, 41, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    )
    for shape in ((len(x),), (1, len(x)), (len(x), 1, 1)):
        u = x.reshape(shape)
        value = basis.forward(u)
        assert value.shape == u.shape, f"{name}.forward: shape {tuple(value.shape)} for input {tuple(u.shape)}"
        assert torch.equal(value.flatten(), basis.forward(x)), f"{name}.forward depends on the shape of its input"
    assert basis.forward(x[:0]).shape == (0,), f"{name}.forward fails for an empty tensor"
    halves = torch.cat([basis.forward(half) for half in (x[: len(x) // 2], x[len(x) // 2 :])])
    same = torch.allclose(halves, basis.forward(x), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert same, f"{name}.forward is not elementwise: half a batch gives other values than the whole"
    inputs = x.clone().requires_grad_()
    phi = transfer.phi(inputs)
    assert phi.isfinite().all(), f"{name}: φ is not finite at or between the grid points"
    (slope,) = torch.autograd.grad(phi.sum(), inputs)
    assert slope.isfinite().all(), f"{name}: φ' is not finite at or between the grid points"
    zero = transfer(torch.zeros(3, dtype=torch.float64))
    assert zero.abs().max() <= 1e-12 * (1 + phi.abs().max()), f"{name}: a centered φ is not zero at zero"


def _check_dtypes(basis: TransferBasis) -> None:
    name = type(basis).__name__
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reference = basis.forward(torch.linspace(-3, 3, 25, dtype=torch.float64))
    assert isinstance(reference, Tensor), f"{name}.forward gives a {type(reference).__name__}, expected a tensor"
    assert reference.shape == (25,), f"{name}.forward: shape {tuple(reference.shape)} for input (25,)"
    for device, dtype in itertools.product(devices, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        u = torch.linspace(-3, 3, 25, dtype=torch.float64, device=device).to(dtype)
        value = basis.forward(u)
        found, expected = (value.dtype, value.device), (u.dtype, u.device)
        assert found == expected, f"{name}.forward gives {found} for an input of {expected}"
        tolerance = 100 * torch.finfo(dtype).eps * (1 + reference.abs().max())
        error = (value.double().cpu() - basis.forward(u.double().cpu())).abs().max()
        assert error <= tolerance, f"{name}.forward in {dtype}: error {error:.1e} against float64"


def _check_gradients(transfer: Transfer) -> None:
    def phi(x: Tensor, *parameters: Tensor) -> Tensor:
        return transfer.with_parameters(*parameters)(x)

    # Away from the kinks that some bases have at integers.
    x = torch.linspace(-1.37, 1.41, 7, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, *transfer.parameters)]
    correct = torch.autograd.gradcheck(phi, inputs, raise_exception=False)
    assert correct, f"{type(transfer.basis).__name__}: gradients in x, alpha, omega, the grid or the gain are wrong"


def _check_derivative(transfer: Transfer) -> None:
    """Compare φ' with finite differences of φ everywhere on [−4, 4]; this also finds jumps, which gradients miss."""
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64).requires_grad_()
    phi = transfer(x)
    (slope,) = torch.autograd.grad(phi.sum(), x)
    rise = phi.detach().diff() / x.detach().diff()
    error = (rise - (slope[1:] + slope[:-1]) / 2).abs().max() / (1 + slope.abs().max())
    assert error < 1e-3, f"{type(transfer.basis).__name__}: φ' differs from φ's rise by {error:.1e}"


def _check_layer(transfer: Transfer) -> None:
    """Compare y = x (W + s (BA + f(BA)))ᵀ + b, values and gradients, of both evaluators with plain autograd."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias, A, B = draw(2, 3, 5), draw(7, 5), draw(7), draw(3, 5), 0.1 * draw(7, 3)
    upstream = draw(2, 3, 7)
    updated = dataclasses.replace(transfer, path=True, scaling=1.5)

    def plain(x: Tensor, A: Tensor, B: Tensor, *parameters: Tensor) -> Tensor:
        f = transfer.with_parameters(*parameters)
        return x @ (weight + 1.5 * (B @ A + f(B @ A))).T + bias

    def layer(backend: str, x: Tensor, A: Tensor, B: Tensor, *parameters: Tensor) -> Tensor:
        chosen = evaluator(updated.with_parameters(*parameters), A, B, backend)
        return adapted_linear(x, weight, bias, A, B, chosen, Execution(backend))

    def with_gradients(function: object, *first: object) -> list[Tensor]:
        assert callable(function)
        inputs = [t.clone().requires_grad_() for t in (x, A, B, *transfer.parameters)]
        y = function(*first, *inputs)
        grads = torch.autograd.grad(y, inputs, upstream, allow_unused=True)
        return [y, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))]

    expected = with_gradients(plain)
    for backend in ("direct", "torch"):
        names = ("the output", "dx", "dA", "dB", "dalpha", "domega", "dgrid", "dgain")
        for name, found, truth in zip(names, with_gradients(layer, backend), expected, strict=True):
            error = (found - truth).abs().max() / (1e-3 + truth.abs().max())
            which = f"{type(transfer.basis).__name__}, {backend} evaluation"
            assert error < 1e-8, f"{which}: {name} is off by {error:.1e} (relative)"


def check_grid(grid: str | type[GridStrategy]) -> None:
    """Check a grid: N distinct points on [−I, I], float64, equal for equal seeds, also for N = 1.

    Raises AssertionError, or InputError for an unknown name.
    """
    strategy = (GRIDS[grid] if isinstance(grid, str) else grid)()
    name = type(strategy).__name__
    for count, interval in itertools.product((1, 2, 8, 50, 512), (0.5, 3.0)):
        points = strategy.points(count, interval, torch.Generator().manual_seed(1))
        again = strategy.points(count, interval, torch.Generator().manual_seed(1))
        assert isinstance(points, Tensor), f"{name}.points gives a {type(points).__name__}, expected a tensor"
        assert points.shape == (count,), f"{name}.points: shape {tuple(points.shape)}, expected ({count},)"
        assert points.dtype == torch.float64, f"{name}.points: {points.dtype}, expected float64"
        assert points.isfinite().all(), f"{name}.points: not finite"
        assert points.abs().max() <= interval * (1 + 1e-12), f"{name}.points: outside [−{interval}, {interval}]"
        assert torch.equal(points, again), f"{name}.points: two different grids from one seed"
        assert len(set(points.tolist())) == count, f"{name}.points: a point occurs twice"


def check_sharing(policy: str | type[SharingPolicy]) -> None:
    """Check a sharing policy: every module gets a row, groups are deterministic, and a bank survives save and load.

    Raises AssertionError, or InputError for an unknown name.
    """
    instance = (SHARING[policy] if isinstance(policy, str) else policy)()
    name = type(instance).__name__
    for parameter in ("alpha", "omega", "x"):
        first = rows(instance, parameter, MODULES)
        groups = [[instance.group(parameter, module) for module in MODULES] for _ in range(2)]
        assert groups[0] == groups[1], f"{name}.group: two answers for one module"
        assert sorted(set(first)) == list(range(max(first) + 1)), f"{name}: rows of {parameter} leave gaps"
        alone = rows(instance, parameter, MODULES[:1])
        assert alone == [0], f"{name}: a single module must use row 0 of {parameter}, not {alone}"
    if isinstance(policy, str):
        check_state(PhiSettings(sharing=policy, num_basis=6, amplitude_init="normal:0.1"))


def check_state(settings: PhiSettings) -> None:
    """Check that a bank's state, loaded into a new bank, gives the same φ in every module, bit for bit.

    Raises AssertionError.
    """
    bank = TransferBank(settings, MODULES)
    other = TransferBank(settings, MODULES)
    state = copy.deepcopy(bank.state_dict())
    assert set(state) == {"alpha", "raw_omega", "grid"}
    other.load_state_dict(state)
    x = torch.linspace(-3, 3, 13)
    for module in MODULES:
        same = torch.equal(bank.transfer(module.name, ONE).phi(x), other.transfer(module.name, ONE).phi(x))
        assert same, f"φ of {module.name} changes through its state"
