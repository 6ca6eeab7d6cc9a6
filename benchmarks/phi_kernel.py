"""W + phi(BA) and its pullback on a GPU: times, and the fraction of what memory allows.

    python benchmarks/phi_kernel.py [--shape 14336x4096] [--rank 32]

The bound is the time in which reading W and writing the result moves through memory, at the bandwidth that a large
copy reaches in the same run. Every result is held against float64 before it is timed: where it is wrong, the error is
printed and no time. Times are medians over repetitions, by events on the device.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from triton import cdiv, jit, testing
from triton import language as tl

from basisadapt.core.environment import environment
from basisadapt.phi import kernels_triton, series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.bases import Sinc
from basisadapt.phi.choice import default_tolerance, evaluator
from basisadapt.phi.evaluators import Series
from basisadapt.phi.kernels import effective_weight

TOLERANCE = default_tolerance(torch.bfloat16)
RADIUS = 0.2  # max |BA|
TURNS = 9
ROWS = 64  # rows that are held against float64


@jit
def _direct_sinc(W, OUT, A, B, alpha, omega, grid, m, n, r, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The fused kernel without a series: N sines per weight."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BR)
    a = tl.load(A + k[:, None] * n + cols[None, :], mask=(k < r)[:, None] & (cols < n)[None, :], other=0.0)
    b = tl.load(B + rows[:, None] * r + k[None, :], mask=(rows < m)[:, None] & (k < r)[None, :], other=0.0)
    z = tl.dot(b, a, input_precision="tf32")
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    place = rows[:, None].to(tl.int64) * n + cols[None, :]
    value = tl.load(W + place, mask=inside, other=0.0).to(tl.float32)
    for i in range(N):
        u = 3.141592653589793 * tl.load(omega + i) * (z - tl.load(grid + i))
        value += tl.load(alpha + i) * tl.where(tl.abs(u) < 1e-6, 1.0, tl.sin(u) / u)
    tl.store(OUT + place, value.to(OUT.dtype.element_ty), mask=inside)


class Bench:
    """One shape: W, A, B and a dense gradient, drawn as training leaves them; timing and checks."""

    def __init__(self, m: int, n: int, r: int) -> None:
        torch.manual_seed(0)
        self.weight = (torch.randn(m, n, device="cuda") * 0.02).bfloat16()
        self.A = torch.randn(r, n, device="cuda") / math.sqrt(n)
        self.B = torch.randn(m, r, device="cuda")
        self.B *= RADIUS / (self.B @ self.A).abs().max()
        self.gradient = (torch.randn(m, n, device="cuda") * 1e-3).bfloat16()
        self.bandwidth = self._copy_bandwidth()
        self.bound = 2 * self.weight.nbytes / self.bandwidth

    @staticmethod
    def _copy_bandwidth() -> float:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.numel() / seconds(lambda: target.copy_(source))

    def transfer(self, num: int) -> Transfer:
        """Sinc, N functions on [−3, 3], amplitudes drawn."""
        generator = torch.Generator(device="cuda").manual_seed(num)
        alpha = torch.randn(num, generator=generator, device="cuda") / num
        grid = torch.linspace(-3, 3, num, device="cuda")
        one = torch.ones((), device="cuda")
        return Transfer(Sinc(), alpha, torch.ones_like(alpha), grid, one, True, True, 1.0)

    def series(self, transfer: Transfer) -> Series:
        """The series that is chosen for F."""
        chosen = evaluator(transfer, self.A, self.B, "triton", TOLERANCE)
        assert isinstance(chosen, Series)
        return chosen

    def forward(self, chosen: Series) -> Callable[[], torch.Tensor]:
        """A function that forms W + F(BA)."""
        return partial(effective_weight, self.weight, self.A, self.B, chosen, torch.bfloat16, "triton")

    def truth(self, transfer: Transfer) -> torch.Tensor:
        """The first rows of W + F(BA), float64."""
        return self.weight[:ROWS].double() + transfer.double()(self.B[:ROWS].double() @ self.A.double())

    def error(self, found: torch.Tensor, truth: torch.Tensor) -> float:
        """The error over that of rounding the truth to the weights' dtype."""
        rounding = (truth.to(found.dtype).double() - truth).norm()
        return ((found[:ROWS].double() - truth).norm() / rounding).item()


def seconds(run: Callable[[], object], milliseconds: int = 60) -> float:
    """The median time of `run` on the device."""
    return float(testing.do_bench(run, warmup=20, rep=milliseconds, return_mode="median")) / 1e3


def forward_row(bench: Bench, name: str, run: Callable[[], torch.Tensor], truth: torch.Tensor, degree: object) -> float:
    """Check, time and print one way to form W + F(BA)."""
    torch.full_like(bench.weight, float("nan"))  # what is not written is seen
    result = run()
    finite, error = bool(result.isfinite().all()), bench.error(result, truth)
    if not finite or not error <= 1.05:
        print(f"| {name} | {degree} | wrong: error {error:.2f} times the rounding, finite: {finite} | | |")
        return math.nan
    time = seconds(run)
    print(f"| {name} | {degree} | {time * 1e6:.0f} µs | {time / bench.bound:.2f} | {error:.3f} |")
    return time


def with_degree(bench: Bench, degree: int) -> tuple[Series, torch.Tensor]:
    """A series of a given length with drawn coefficients that fall off, and W plus its value."""
    base = bench.series(bench.transfer(8))
    falling = torch.exp(-10.0 * torch.arange(128, dtype=torch.float64, device="cuda") / degree)
    generator = torch.Generator(device="cuda").manual_seed(degree)
    drawn = 0.01 * torch.randn(128, generator=generator, device="cuda", dtype=torch.float64) * falling
    coefficients = torch.where(torch.arange(128, device="cuda") < degree, drawn, 0.0)
    radius = 1 / base.packed[1:2].double()
    length = torch.tensor([degree], dtype=torch.int32, device="cuda")
    extended = coefficients @ series.with_powers(128, coefficients.device)
    batch = series.SeriesBatch(extended.unsqueeze(0), length, radius, length > 0)
    made = Series(extended, series.pack(batch)[0].float(), degree)
    t = (bench.B[:ROWS].double() @ bench.A.double()) / radius
    polynomials = torch.cos(torch.arange(degree, device="cuda").double().view(-1, 1, 1) * torch.arccos(t))
    return made, bench.weight[:ROWS].double() + torch.einsum("d,dmn->mn", coefficients[:degree], polynomials)


def check_gradients(bench: Bench, transfer: Transfer, chosen: Series) -> float:
    """The largest relative error of dA (first columns), dB (first rows) and the moments, against float64."""
    grad_a, grad_b, (sums,) = kernels_triton.pull_back(bench.gradient.clone(), bench.A, bench.B, chosen)
    moments = series.with_powers(128, sums.device) @ sums
    A, B = bench.A.double(), bench.B.double()

    def slope(z: torch.Tensor) -> torch.Tensor:
        z = z.requires_grad_()
        return torch.autograd.grad(transfer.double()(z).sum(), z)[0]

    of_rows = (bench.gradient[:ROWS].double() * slope(B[:ROWS] @ A)) @ A.T
    of_columns = B.T @ (bench.gradient[:, :ROWS].double() * slope(B @ A[:, :ROWS]))
    t = (B @ A) * chosen.packed[1].double()
    some = torch.stack([(bench.gradient.double() * torch.cos(d * torch.arccos(t))).sum() for d in (0, 1, 5)])
    pairs = ((grad_b[:ROWS], of_rows), (grad_a[:, :ROWS], of_columns), (moments[[0, 1, 5]], some))
    return max(((found.double() - truth).norm() / truth.norm()).item() for found, truth in pairs)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="14336x4096")
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    for name, value in environment().items():
        print(f"{name}: {value}")
    m, n = (int(side) for side in arguments.shape.split("x"))
    bench = Bench(m, n, arguments.rank)
    print(
        f"\nW {m} × {n} bfloat16, r = {arguments.rank}, max |BA| = {RADIUS}; copy of 1 GiB "
        f"{bench.bandwidth / 1e12:.2f} TB/s; bound {bench.bound * 1e6:.1f} µs"
    )
    target = torch.empty_like(bench.weight)
    plain = seconds(lambda: target.copy_(bench.weight))
    print(f"a copy of W itself: {plain * 1e6:.1f} µs, {plain / bench.bound:.2f} × the bound\n")

    print("| W + phi(BA) | degree | time | × the bound | error / rounding |\n|---|---:|---:|---:|---:|")
    compiled: dict[int, float] = {}
    runs: dict[int, Callable[[], torch.Tensor]] = {}
    for num in (8, 50, 512):
        transfer = bench.transfer(num)
        chosen = bench.series(transfer)
        runs[num] = bench.forward(chosen)
        compiled[num] = forward_row(bench, f"sinc, N = {num}", runs[num], bench.truth(transfer), chosen.width)
    for degree in (8, 16, 32, 64, 128):
        chosen, truth = with_degree(bench, degree)
        forward_row(bench, "a series drawn", bench.forward(chosen), truth, degree)

    transfer = bench.transfer(50)

    def direct() -> torch.Tensor:
        out = torch.empty_like(bench.weight)
        _direct_sinc[(cdiv(n, 64), cdiv(m, 64))](
            bench.weight, out, bench.A, bench.B, transfer.alpha, transfer.omega, transfer.grid, m, n, arguments.rank,
            50, BM=64, BN=64, BR=max(16, 1 << (arguments.rank - 1).bit_length()),
        )  # fmt: skip
        return out

    # The direct kernel has neither centre nor path: it is held against phi alone, with the same work per weight.
    bare = Transfer(Sinc(), *transfer.parameters)
    slow = forward_row(bench, "direct kernel, N = 50", direct, bench.truth(bare), "-")
    compiled_direct = torch.compile(lambda w, a, b: (w + bare(b @ a)).to(torch.bfloat16))
    torch.set_float32_matmul_precision("high")
    forward_row(
        bench, "torch.compile of direct, N = 50", lambda: compiled_direct(bench.weight, bench.A, bench.B),
        bench.truth(bare), "-",
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    in_turns = sorted(seconds(runs[512]) / seconds(runs[8]) for _ in range(TURNS))
    print(
        f"\nN = 512 / N = 8, median of {TURNS} measured in turns: {median(in_turns):.3f} ({in_turns[0]:.3f} to "
        f"{in_turns[-1]:.3f}); direct kernel / compiled, N = 50: {slow / compiled[50]:.0f}"
    )

    print("\n| from the dense gradient | degree | time | × the forward's bound | error |\n|---|---:|---:|---:|---:|")
    for num in (8, 50, 512):
        transfer = bench.transfer(num)
        chosen = bench.series(transfer)
        error = check_gradients(bench, transfer, chosen)
        if not error <= 1e-2:
            print(f"| dA, dB and moments, N = {num} | {chosen.width} | wrong: error {error:.1e} | | |")
            continue
        work = bench.gradient.clone()  # overwritten at each repetition, which changes nothing but its values
        time = seconds(partial(kernels_triton.pull_back, work, bench.A, bench.B, chosen))
        print(
            f"| dA, dB and moments, N = {num} | {chosen.width} | {time * 1e6:.0f} µs "
            f"| {time / bench.bound:.2f} | {error:.1e} |"
        )


if __name__ == "__main__":
    main()
