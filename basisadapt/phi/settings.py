"""Every setting of an adapter, by name: the one table behind PhiConfig, study files and the command line."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from basisadapt.core.errors import refused, unknown
from basisadapt.core.settings import late, seed
from basisadapt.phi.dense_gradient import DenseGradient
from basisadapt.phi.notation import LARGEST, MODERATE, Amplitudes, Bandwidth, Gain, Rate, moderate

PRESETS: dict[str, dict[str, Any]] = {
    # The published recipe, taken literally (paper, section 3.3 and Table 10).
    "paper": {
        "identity_path": False,
        "centre": False,
        "gain": 1.0,
        "amplitude_init": "zero",
        "omega_init": 1.0,
        "factor_init": "lora",
        "transfer_lr": 1.0,
    },
    # phi learns what LoRA's linear update lacks: same start as LoRA, no dead point.
    "residual": {
        "identity_path": True,
        "centre": True,
        "gain": 30.0,
        "amplitude_init": "zero",
        "omega_init": 1.0,
        "factor_init": "lora",
        "transfer_lr": 1.0,
    },
    # The grid's own bandwidth, a gain that brings BA onto the grid, and a rate of φ that does not follow the base rate:
    # α and ω have no unit, whatever A and B are trained with.
    "nyquist": {
        "identity_path": True,
        "centre": True,
        "gain": 300.0,
        "amplitude_init": "zero",
        "omega_init": "nyquist",
        "factor_init": "lora",
        "transfer_lr": "absolute:0.03",
    },
}


# Beyond these a setting is a slip of the pen, and would be memory that nobody has.
MOST_RANK = 16_384
MOST_FUNCTIONS = 4_096

BACKENDS = ("auto", "triton", "torch", "direct")


# Not frozen, unlike the other settings: peft's configuration class, which PhiConfig also extends, is not.
@dataclass(kw_only=True)
class LowRankSettings:
    """What every low-rank method shares.

    r: rank of B (out_features × r) and A (r × in_features), at most 16,384.
    lora_alpha: the update is scaled by s = lora_alpha / r; None means lora_alpha = r, so s = 1; at most 1e6 in size.
    dropout: probability of dropping an input of the adapter's path while training (paper, appendix C).
    placement: which linear modules are adapted, resolved from the architecture: "all", "attention", "mlp", "qkv",
    "gate_up", "odd", "even", "first_last:K" (see adapter/placement.py), or a regular expression over their names.
    target_modules: explicit module names (suffixes) or one regular expression; overrides `placement`.
    """

    r: int = 8
    lora_alpha: float | None = None
    dropout: float = 0.0
    placement: str = "all"
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        require(1 <= self.r <= MOST_RANK, "r", self.r, f"at least 1 and at most {MOST_RANK}")
        if self.lora_alpha is None:
            self.lora_alpha = float(self.r)
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        require(abs(self.lora_alpha) <= LARGEST, "lora_alpha", self.lora_alpha, "from -1e6 to 1e6")

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r."""
        assert self.lora_alpha is not None
        return self.lora_alpha / self.r


@dataclass(kw_only=True)
class PhiSettings(LowRankSettings):
    """ΔW = s · (p·BA + (φ(g·BA) − c·φ(0)) / g),  φ(x) = Σᵢ αᵢ b(ωᵢ, x, xᵢ),  i = 1..N.

    A preset ("paper": p = 0, c = 0, g = 1; "residual" and "nyquist": p = c = 1) fills every setting left at None.

    basis, grid, sharing: names in the registries. num_basis N, at most 4,096; interval I: the grid lies on [−I, I].
    interval, ω₀ and the number of the gain are from 1e-6 to 1e6.
    rest: the projections outside the placement are "frozen", or get "lora": BA of the same rank, scale and start,
    without φ. omega_init: ω₀ > 0, or "nyquist" for (N − 1) / (2I), one over the grid's spacing, or "depth:LOW:HIGH",
    linear in depth from LOW in the first block to HIGH in the last adapted one (paper, Table 23; a shared row starts
    at the mean of its modules). learn_omega: whether ω trains.
    identity_path p, centre c, gain g: see the formula; "learned:G" trains log g of every module, from g = G on;
    "normalised:G" is G over the root mean square of BA, a constant to the gradient.
    amplitude_init: "zero", "identity" (least-squares fit of φ(x) = x on the grid's interval), "normal:σ", or "fan_in":
    1 / √in_features, which does not train. factor_init: "lora" (A Kaiming-uniform, B = 0) or "both" (B as A).
    transfer_lr: learning rate of α, ω, learned x and learned g as a ratio to the base rate, or "absolute:RATE".
    transfer_decay: decoupled weight decay of α, towards φ = 0. transfer_delay: for this share of the steps they rest,
    and A and B train alone.
    smoothing λ: the loss gets λ times the mean of φ''² over the grid's interval and the modules.
    grid_seed: of the random grid; None takes the run's seed, or 0 outside a run. backend: "auto" compiles φ once a step
    and takes fused kernels on a GPU with Triton; "triton" and "torch" choose; "direct" sums the N basis functions for
    every weight (the reference, N times slower). tolerance: of compiled φ, relative to the largest value of ΔW; None
    takes 1e-6, over half-precision weights what their rounding hides. dense_gradient: of the one product no elementwise
    φ avoids: "exact", "fp8" (8-bit operands) or "sketch:K" (K tokens added up under random signs; unbiased).

    Raises InputError for a name that is not registered or a value out of range. Source: paper, section 3.3.
    """

    preset: str = "residual"
    rest: str = "frozen"
    basis: str = "sinc"
    grid: str = "uniform"
    grid_seed: int | None = seed()
    num_basis: int = 50
    interval: float = 3.0
    omega_init: float | str | None = None
    learn_omega: bool = True
    identity_path: bool | None = None
    centre: bool | None = None
    gain: float | str | None = None
    amplitude_init: str | None = None
    factor_init: str | None = None
    sharing: str = "none"
    transfer_lr: float | str | None = None
    transfer_decay: float = 0.0
    backend: str = "auto"
    tolerance: float | None = None
    dense_gradient: str = "exact"
    transfer_delay: float = late(0.0)
    smoothing: float = late(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_names()
        few = 1 <= self.num_basis <= MOST_FUNCTIONS
        require(few, "num_basis", self.num_basis, f"at least 1 and at most {MOST_FUNCTIONS}")
        require(moderate(self.interval), "interval", self.interval, MODERATE)
        require(self.rest in ("frozen", "lora"), "rest", self.rest, '"frozen" or "lora"')
        _ = self.bandwidth, self.gain_form, self.rate, self.amplitudes, self.dense  # what cannot be parsed is refused
        require(0.0 <= self.transfer_decay < math.inf, "transfer_decay", self.transfer_decay, "at least 0")
        require(0.0 <= self.transfer_delay <= 1.0, "transfer_delay", self.transfer_delay, "from 0 to 1")
        require(0.0 <= self.smoothing < math.inf, "smoothing", self.smoothing, "at least 0")
        require(self.factor_init in ("lora", "both"), "factor_init", self.factor_init, '"lora" or "both"')
        in_range = self.tolerance is None or 0.0 < self.tolerance <= 1e-2
        require(in_range, "tolerance", self.tolerance, "above 0 and at most 0.01")
        require(self.backend in BACKENDS, "backend", self.backend, " or ".join(f'"{name}"' for name in BACKENDS))

    def _check_names(self) -> None:
        # Imported here: the registries' modules are siblings that need no settings, and a user's plug-ins come late.
        from basisadapt.phi.basis import BASES
        from basisadapt.phi.grids import GRIDS
        from basisadapt.phi.sharing import SHARING

        BASES[self.basis], GRIDS[self.grid], SHARING[self.sharing]

    @property
    def bandwidth(self) -> Bandwidth:
        """omega_init, parsed; "nyquist" is one over the spacing of a uniform grid."""
        return Bandwidth.parse(self.omega_init, (self.num_basis - 1) / (2 * self.interval))

    @property
    def gain_form(self) -> Gain:
        """gain, parsed."""
        return Gain.parse(self.gain)

    @property
    def rate(self) -> Rate:
        """transfer_lr, parsed."""
        return Rate.parse(self.transfer_lr)

    @property
    def amplitudes(self) -> Amplitudes:
        """amplitude_init, parsed."""
        return Amplitudes.parse(self.amplitude_init)

    @property
    def dense(self) -> DenseGradient:
        """dense_gradient, parsed."""
        return DenseGradient.parse(self.dense_gradient)


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError unless `holds`."""
    if not holds:
        raise refused(name, value, expected)


def field_names(cls: type) -> tuple[str, ...]:
    """The names of a settings class's fields, in order."""
    return _field_names(cls)


@functools.cache
def _field_names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))
