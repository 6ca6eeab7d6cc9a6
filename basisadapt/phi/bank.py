"""The tables of φ: α, ω and grid points of all adapted modules, and φ evaluated directly from them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from basisadapt.core.errors import InputError
from basisadapt.core.grouping import grouped
from basisadapt.phi.basis import BASES, TransferBasis, width
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.notation import Amplitudes
from basisadapt.phi.settings import PhiSettings
from basisadapt.phi.sharing import SHARING, AdaptedModule, rows

LEAST_SIZE = 1e-6  # a lower bound of the rms of BA that normalizes a gain: BA may start at zero
POINTS_PER_FUNCTION = 8  # points per basis function
ONE = torch.ones(())


@dataclass(frozen=True)
class Transfer:
    """The transfer function of one module: ΔW = F(BA) with F(z) = s (p z + (φ(g z) − c φ(0)) / g).

    φ(x) = Σᵢ αᵢ b(ωᵢ, x, xᵢ), i = 1..N. One object may hold the functions of M modules.

    - `basis`: b.
    - `alpha`: α, shape (N,) or (M, N). With one dimension more than the grid, (..., N, k), there are k functions side
      by side, which differ only in their amplitudes.
    - `omega`: ω > 0, shape (N,) or (M, N).
    - `grid`: x₁..x_N, shape (N,) or (M, N).
    - `gain`: g > 0, shape () or (M,), default 1.
    - `centre` (bool, default False): c.
    - `path` (bool, default False): p, the identity path.
    - `scaling` (float, default 1): s.
    """

    basis: TransferBasis
    alpha: Tensor
    omega: Tensor
    grid: Tensor
    gain: Tensor = ONE
    centre: bool = False
    path: bool = False
    scaling: float = 1.0

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """α, ω, the grid and g, to which gradients flow."""
        return self.alpha, self.omega, self.grid, self.gain

    def with_parameters(self, alpha: Tensor, omega: Tensor, grid: Tensor, gain: Tensor) -> Transfer:
        """The same function with other parameters, of shapes as in the class."""
        return dataclasses.replace(self, alpha=alpha, omega=omega, grid=grid, gain=gain)

    def double(self) -> Transfer:
        """The same function in float64, differentiable back to the original parameters."""
        return self.with_parameters(*(parameter.double() for parameter in self.parameters))

    def phi(self, x: Tensor) -> Tensor:
        """φ(x) for x of shape (..., K), or (M, ..., K) for M modules; the same shape, plus (k,) for k functions.

        It needs memory for N values per element of x, so pass few elements at a time.
        """
        modules = self.grid.shape[:-1]
        points = x.reshape(*modules, -1, 1)
        values = self.basis(points, self.omega.unsqueeze(-2), self.grid.unsqueeze(-2))
        side_by_side = self.alpha.dim() > self.grid.dim()
        phi = values @ (self.alpha if side_by_side else self.alpha.unsqueeze(-1))
        return phi.reshape(*x.shape, -1) if side_by_side else phi.reshape(x.shape)

    def __call__(self, z: Tensor) -> Tensor:
        """F(z) = s (p z + (φ(g z) − c φ(0)) / g), with the shapes of `phi`."""
        phi = self.phi(_beside(self.gain, z) * z)
        if self.centre:
            first = self.grid.shape[:-1]
            origin = self.phi(z.new_zeros(*first, 1))
            phi = phi - origin.reshape(*first, *[1] * (z.dim() - len(first)), *origin.shape[len(first) + 1 :])
        f = phi / _beside(self.gain, phi)
        if self.path:
            f = f + z.reshape(*z.shape, *[1] * (f.dim() - z.dim()))
        return self.scaling * f


def _beside(gain: Tensor, values: Tensor) -> Tensor:
    """The gain of each module in a shape that multiplies `values`."""
    return gain.reshape(*gain.shape, *[1] * (values.dim() - gain.dim()))


class TransferBank(nn.Module):
    """The parameters of φ of all M adapted modules, in tables; a sharing policy assigns each module its rows.

    - `alpha`, `raw_omega`, `grid`: shape (rows, N) each; ω = softplus(raw_omega) > 0 starts at ω₀ (paper, section 3.3).
    - `log_gain`: log g, shape (M,); only if the gain is learned.
    - `rows`: each module's name and its rows of alpha, raw_omega and grid.
    - `loaded` (int): how many times a state was loaded.

    Tables that do not train are buffers. They are saved too, so an adapter file alone defines φ. Raises InputError for
    settings that do not fit the modules.
    """

    alpha: Tensor
    raw_omega: Tensor
    grid: Tensor
    log_gain: Tensor
    loaded: int = 0

    def __init__(self, settings: PhiSettings, modules: Sequence[AdaptedModule]) -> None:
        super().__init__()
        self.basis = BASES[settings.basis]()
        self._gain_form, self._interval = settings.gain_form, settings.interval
        self._formula = bool(settings.centre), bool(settings.identity_path), settings.scaling
        policy, strategy = SHARING[settings.sharing](), GRIDS[settings.grid]()
        assigned = {parameter: rows(policy, parameter, modules) for parameter in ("alpha", "omega", "x")}
        count = {parameter: max(row, default=-1) + 1 for parameter, row in assigned.items()}
        self.rows = {
            module.name: (alpha, omega, x) for module, alpha, omega, x in zip(modules, *assigned.values(), strict=True)
        }

        generator = torch.Generator().manual_seed(settings.grid_seed or 0)
        points = [strategy.points(settings.num_basis, settings.interval, generator) for _ in range(count["x"])]
        grid = torch.stack(points).float()
        omega = torch.tensor(_omega0(settings, modules, assigned["omega"])).unsqueeze(1).repeat(1, settings.num_basis)
        alpha = torch.zeros(count["alpha"], settings.num_basis)
        self._table("grid", grid, strategy.trainable)
        self._table("raw_omega", omega, settings.learn_omega)
        self._table("alpha", alpha, settings.amplitudes.kind != "fan_in")
        if self._gain_form.kind == "learned":
            self._table("log_gain", torch.full((len(modules),), math.log(self._gain_form.number)), True)
        if not self.alpha.is_meta:  # peft makes empty modules to load into, which need no initialization
            self._initialize_alpha(settings.amplitudes, settings.interval, modules)

    def _table(self, name: str, values: Tensor, trainable: bool) -> None:
        if trainable:
            setattr(self, name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    @torch.no_grad()
    def _initialize_alpha(self, init: Amplitudes, interval: float, modules: Sequence[AdaptedModule]) -> None:
        if init.kind == "normal":
            self.alpha.normal_(0.0, init.sigma)
        if init.kind == "fan_in":
            fan_in: dict[int, int | None] = {}
            for module in modules:
                row = self.rows[module.name][0]
                if module.in_features is None or fan_in.setdefault(row, module.in_features) != module.in_features:
                    raise InputError('amplitude_init "fan_in" needs equal in_features wherever modules share alpha')
                self.alpha[row] = module.in_features**-0.5
        if init.kind == "identity":
            for module, (alpha, _, _) in self.rows.items():
                self.alpha[alpha] = _identity_fit(self.transfer(module, self.alpha.new_ones(())), interval)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """alpha, raw_omega, grid and, if it is learned, log_gain, whether or not they train."""
        gain = (self.log_gain,) if self._gain_form.kind == "learned" else ()
        return self.alpha, self.raw_omega, self.grid, *gain

    def gains(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """g of every module, shape (M,), float64. No gradient flows through a normalized gain.

        pairs: A (r, n) and B (m, r) of every module, in the order of `rows`.
        """
        form = self._gain_form
        if form.kind == "learned":
            return self.log_gain.double().exp()
        if form.kind == "normalised":
            return form.number / root_mean_squares(pairs).clamp_min(LEAST_SIZE)
        return torch.full((len(self.rows),), form.number, dtype=torch.float64, device=self.alpha.device)

    def transfer(self, module: str, gain: Tensor) -> Transfer:
        """The transfer function of the module of that name; gain: its g, shape ()."""
        alpha, omega, x = self.rows[module]
        return self._transfer(self.alpha[alpha], self.raw_omega[omega], self.grid[x], gain)

    def functions(self, gains: Tensor) -> Callable[..., Transfer]:
        """A function that makes the transfer functions of all M modules from `tables`, or from copies of them.

        gains: g, shape (M,), which is used unless the gain is learned.
        """

        def make(alpha: Tensor, raw_omega: Tensor, grid: Tensor, log_gain: Tensor | None = None) -> Transfer:
            return self.transfers(alpha, raw_omega, grid, gains if log_gain is None else log_gain.double().exp())

        return make

    def kept_transfer(self, module: str, gain: Tensor, copies: tuple[Tensor, ...]) -> Transfer:
        """`transfer` from copies of the tables, in float64: with large amplitudes, rounding ω first would show.

        Gradients flow to the tables themselves, in any number of backward passes. gain: g, shape (), which is used
        unless the gain is learned.
        """
        rows, index = self.rows[module], list(self.rows).index(module)

        def choose(alpha: Tensor, raw_omega: Tensor, grid: Tensor, *log_gain: Tensor) -> tuple[Tensor, ...]:
            learned = [log[index].double().exp() for log in log_gain]
            return alpha[rows[0]].double(), F.softplus(raw_omega[rows[1]].double()), grid[rows[2]].double(), *learned

        alpha, omega, grid, *learned = _Kept.apply(choose, copies, *self.tables)  # type: ignore[no-untyped-call]
        return Transfer(self.basis, alpha, omega, grid, learned[0] if learned else gain, *self._formula)

    def transfers(self, alpha: Tensor, raw_omega: Tensor, grid: Tensor, gains: Tensor) -> Transfer:
        """The transfer functions of all M modules, in the order of `rows`, from the bank's tables or copies of them.

        gains: g, shape (M,).
        """
        columns = zip(*self.rows.values(), strict=True)
        tables = (alpha, raw_omega, grid)
        picked = [_pick(table, rows) for table, rows in zip(tables, columns, strict=True)]
        return self._transfer(picked[0], picked[1], picked[2], gains)

    def _transfer(self, alpha: Tensor, raw_omega: Tensor, grid: Tensor, gain: Tensor) -> Transfer:
        return Transfer(self.basis, alpha, F.softplus(raw_omega), grid, gain, *self._formula)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.loaded += 1
        super()._load_from_state_dict(*args, **kwargs)

    def roughness(self) -> Tensor:
        """The mean of φ''² over [−I, I] and the modules, a scalar, by differences; POINTS_PER_FUNCTION points each."""
        one = self.alpha.new_ones(len(self.rows))
        functions = self.transfers(self.alpha, self.raw_omega, self.grid, one)
        count = POINTS_PER_FUNCTION * self.alpha.shape[1] + 2
        x = torch.linspace(-self._interval, self._interval, count, device=one.device, dtype=one.dtype)
        second = functions.phi(x.expand(len(one), -1)).diff(n=2) * ((count - 1) / (2 * self._interval)) ** 2
        return second.square().mean()


class _Kept(torch.autograd.Function):
    """`choose(*copies)`, with gradients to the tables. One backward pass would free saved tensors, but not copies."""

    @staticmethod
    def forward(
        ctx: Any, choose: Callable[..., tuple[Tensor, ...]], copies: tuple[Tensor, ...], *tables: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.choose, ctx.copies = choose, copies
        return choose(*copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [copy.detach().requires_grad_() for copy in ctx.copies]
            grads = torch.autograd.grad(ctx.choose(*leaves), leaves, upstream)
        return None, None, *grads


def _pick(table: Tensor, rows: tuple[int, ...]) -> Tensor:
    everything = rows == tuple(range(len(table)))
    # Indexing by a tensor: its gradient is summed in a fixed order on a GPU too.
    return table if everything else table[index_tensor(rows, table.device)]


@functools.cache
def index_tensor(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """`rows` as an integer tensor on the device, shape (len(rows),), copied there once: copying blocks the host."""
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


@torch.no_grad()
def root_mean_squares(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The root mean square of the entries of BA for every pair A (r, n), B (m, r): shape (M,), float64.

    Computed as ‖BA‖² = tr(BᵀB AAᵀ), without the product. On a GPU, equal shapes are stacked, to launch few kernels.
    """
    if pairs[0][0].device.type == "cpu":
        return torch.stack([_root_mean_square(A, B) for A, B in pairs])
    return _at_once(pairs)


def _at_once(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`root_mean_squares` with equal shapes stacked."""
    groups = grouped(((A.shape, B.shape, A.dtype), index) for index, (A, B) in enumerate(pairs))
    found = torch.empty(len(pairs), dtype=torch.float64, device=pairs[0][0].device)
    for members in groups.values():
        A, B = (torch.stack([pairs[index][side] for index in members]) for side in (0, 1))
        found[index_tensor(tuple(members), found.device)] = _root_mean_square(A, B)
    return found


def _root_mean_square(A: Tensor, B: Tensor) -> Tensor:
    """That of one pair, shape (), or of stacked ones, (K, r, n) and (K, m, r), shape (K,)."""
    A, B = A.double(), B.double()
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).div(B.shape[-2] * A.shape[-1]).sqrt()


def _omega0(settings: PhiSettings, modules: Sequence[AdaptedModule], rows: Sequence[int]) -> list[float]:
    """raw_omega at the start, for every row. Raises InputError if ω₀ depends on a depth that is not known."""
    bandwidth = settings.bandwidth
    last = max((module.layer or 0 for module in modules), default=0)
    values: dict[int, list[float]] = {}
    for module, row in zip(modules, rows, strict=True):
        if bandwidth.by_depth and module.layer is None:
            raise InputError(f"omega_init {settings.omega_init!r} needs numbered blocks; {module.name!r} is in none")
        values.setdefault(row, []).append(bandwidth.at((module.layer or 0) / max(last, 1)))
    return [inverse_softplus(math.fsum(shared) / len(shared)) for shared in values.values()]


def inverse_softplus(omega: float) -> float:
    """ω̃ = ln(e^ω − 1) for ω > 0, so that softplus(ω̃) = ω; a large ω does not overflow."""
    return omega + math.log(-math.expm1(-omega))


def _identity_fit(transfer: Transfer, interval: float) -> Tensor:
    """Least-squares amplitudes for φ(x) = x on [−I, I], in float64, without relative singular values below 1e-6.

    The points are equally spaced. Functions too narrow for them are fitted at their own grid points too.
    """
    reference = transfer.double()
    count = 8 * len(reference.alpha)
    x = torch.linspace(-interval, interval, count + 1, dtype=torch.float64, device=reference.grid.device)
    spacing = reference.omega.max() * (2 * interval / count)
    if reference.basis.argument == "shifted" and spacing > width(type(reference.basis)):
        x = torch.cat([x, reference.grid])
    design = reference.basis(x.unsqueeze(-1), reference.omega, reference.grid)
    amplitudes: Tensor = torch.linalg.pinv(design, rtol=1e-6) @ x
    return amplitudes.to(transfer.alpha.dtype)
