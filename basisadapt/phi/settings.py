"""All settings of a φ(BA) adapter, shared by PhiConfig, study files and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from basisadapt.core.errors import require, unknown
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
    # φ adds to LoRA's linear update: the start is LoRA's, and it is no dead point.
    "residual": {
        "identity_path": True,
        "centre": True,
        "gain": 30.0,
        "amplitude_init": "zero",
        "omega_init": 1.0,
        "factor_init": "lora",
        "transfer_lr": 1.0,
    },
    # The bandwidth of the grid, a gain that scales BA to the grid, and a learning rate of φ that does not follow the
    # base rate: α and ω are dimensionless, whatever the rate of A and B.
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


# Larger values are typing errors, and would need more memory than any machine has.
MAX_RANK = 16_384
MAX_FUNCTIONS = 4_096

BACKENDS = ("auto", "triton", "torch", "direct")


# Not frozen, unlike the other settings: peft's configuration class, which PhiConfig also extends, is not.
@dataclass(kw_only=True)
class LowRankSettings:
    """The settings of every low-rank method.

    - `r` (int in [1, 16384], default 8): rank of B (out_features × r) and A (r × in_features).
    - `lora_alpha` (float in [−1e6, 1e6] or None, default None): the update is scaled by s = lora_alpha / r; None means
      lora_alpha = r, so s = 1.
    - `dropout` (float in [0, 1), default 0): probability of dropping an input of the adapter while training (paper,
      appendix C).
    - `placement` (str, default "all"): the linear modules to adapt, found from the architecture: "all", "attention",
      "mlp", "qkv", "gate_up", "odd", "even" or "first_last:K" (see `adapter.placement`), or a regular expression over
      their names.
    - `target_modules` (list of str, str or None, default None): module names (suffixes), or one regular expression;
      overrides `placement`.

    Raises InputError for a value out of range.
    """

    r: int = 8
    lora_alpha: float | None = None
    dropout: float = 0.0
    placement: str = "all"
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        require(1 <= self.r <= MAX_RANK, "r", self.r, f"at least 1 and at most {MAX_RANK}")
        if self.lora_alpha is None:
            self.lora_alpha = float(self.r)
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        require(abs(self.lora_alpha) <= LARGEST, "lora_alpha", self.lora_alpha, "from -1e6 to 1e6")

    @property
    def scaling(self) -> float:
        """The scale of the update, s = lora_alpha / r."""
        assert self.lora_alpha is not None
        return self.lora_alpha / self.r


@dataclass(kw_only=True)
class PhiSettings(LowRankSettings):
    """ΔW = s · (p·BA + (φ(g·BA) − c·φ(0)) / g),  φ(x) = Σᵢ αᵢ b(ωᵢ, x, xᵢ),  i = 1..N.

    The settings of `LowRankSettings` and, in this order (a setting that is None takes the preset's value):

    - `preset` (str, default "residual"): "paper" (the published recipe, p = c = 0 and g = 1; section 3.3 and Table 10),
      "residual" or "nyquist" (both p = c = 1); `PRESETS` holds their values.
    - `rest` (str, default "frozen"): the projections outside the placement are "frozen", or get "lora": BA of the same
      rank, scale and start, without φ.
    - `basis` (str, default "sinc"): the name of b in the registry of bases (paper, Table 13).
    - `grid` (str, default "uniform"): the name of the placement of the grid points xᵢ (paper, Table 14).
    - `grid_seed` (int or None, default None): the seed of a random grid; None uses the run's seed, or 0 outside a run.
    - `num_basis` (int in [1, 4096], default 50): N, the number of basis functions.
    - `interval` (float in [1e-6, 1e6], default 3): I; the grid lies on [−I, I].
    - `omega_init` (float in [1e-6, 1e6] or str): ω₀; "nyquist" for (N − 1) / (2I), one over the spacing of the uniform
      grid; or "depth:LOW:HIGH", linear in depth from LOW in the first block to HIGH in the last adapted one (paper,
      Table 23), where a shared row starts at the mean over its modules.
    - `learn_omega` (bool, default True): ω trains.
    - `identity_path` (bool): p, whether BA itself is part of the update.
    - `centre` (bool): c, whether φ(0) is subtracted.
    - `gain` (float in [1e-6, 1e6] or str): g; "learned:G" trains log g of every module, starting at g = G;
      "normalised:G" is G over the root mean square of BA, without a gradient through it.
    - `amplitude_init` (str): the start of α: "zero", "identity" (the least-squares fit of φ(x) = x on [−I, I]),
      "normal:SIGMA" (N(0, SIGMA²), SIGMA in [0, 1e6]), or "fan_in" (1 / √in_features, which does not train).
    - `factor_init` (str): "lora" (A Kaiming-uniform, B = 0) or "both" (B drawn like A).
    - `sharing` (str, default "none"): the name of the policy by which modules share α, ω and x (paper, Table 20).
    - `transfer_lr` (float ≥ 0 or str): the learning rate of α, ω, learned x and learned g, as a ratio to the base rate;
      or "absolute:RATE".
    - `transfer_decay` (float ≥ 0, default 0): decoupled weight decay of α, toward φ = 0.
    - `backend` (str, default "auto"): "auto" compiles φ once per step, and uses fused kernels on a GPU with Triton;
      "triton" and "torch" force one of the two; "direct" sums the N basis functions for every weight (the reference, N
      times slower).
    - `tolerance` (float in (0, 0.01] or None, default None): the error of compiled φ, relative to the largest value of
      ΔW; None is 1e-6, or more where the rounding of half-precision weights hides it.
    - `dense_gradient` (str, default "exact"): the one dense product that an elementwise φ cannot avoid: "exact", "fp8"
      (8-bit operands) or "sketch:K" (K sums of tokens under random signs; unbiased).
    - `transfer_delay` (float in [0, 1], default 0): for this share of the steps φ is frozen, and only A and B train.
    - `smoothing` (float ≥ 0, default 0): λ; the loss gets λ times the mean of φ''² over [−I, I] and the modules.

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
            raise unknown("adapter preset", self.preset, PRESETS)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_names()
        few = 1 <= self.num_basis <= MAX_FUNCTIONS
        require(few, "num_basis", self.num_basis, f"at least 1 and at most {MAX_FUNCTIONS}")
        require(moderate(self.interval), "interval", self.interval, MODERATE)
        require(self.rest in ("frozen", "lora"), "rest", self.rest, '"frozen" or "lora"')
        _ = self.bandwidth, self.gain_form, self.rate, self.amplitudes, self.dense  # parsing raises InputError
        require(0.0 <= self.transfer_decay < math.inf, "transfer_decay", self.transfer_decay, "at least 0")
        require(0.0 <= self.transfer_delay <= 1.0, "transfer_delay", self.transfer_delay, "from 0 to 1")
        require(0.0 <= self.smoothing < math.inf, "smoothing", self.smoothing, "at least 0")
        require(self.factor_init in ("lora", "both"), "factor_init", self.factor_init, '"lora" or "both"')
        in_range = self.tolerance is None or 0.0 < self.tolerance <= 1e-2
        require(in_range, "tolerance", self.tolerance, "above 0 and at most 0.01")
        require(self.backend in BACKENDS, "backend", self.backend, " or ".join(f'"{name}"' for name in BACKENDS))

    def _check_names(self) -> None:
        # Imported here: the registries need no settings, and a user's plug-ins are loaded late.
        from basisadapt.phi.basis import BASES, check_values
        from basisadapt.phi.grids import GRIDS
        from basisadapt.phi.sharing import SHARING

        check_values(BASES[self.basis])
        GRIDS[self.grid], SHARING[self.sharing]

    @property
    def bandwidth(self) -> Bandwidth:
        """The parsed omega_init. Raises InputError."""
        return Bandwidth.parse(self.omega_init, (self.num_basis - 1) / (2 * self.interval))

    @property
    def gain_form(self) -> Gain:
        """The parsed gain. Raises InputError."""
        return Gain.parse(self.gain)

    @property
    def rate(self) -> Rate:
        """The parsed transfer_lr. Raises InputError."""
        return Rate.parse(self.transfer_lr)

    @property
    def amplitudes(self) -> Amplitudes:
        """The parsed amplitude_init. Raises InputError."""
        return Amplitudes.parse(self.amplitude_init)

    @property
    def dense(self) -> DenseGradient:
        """The parsed dense_gradient. Raises InputError."""
        return DenseGradient.parse(self.dense_gradient)
