"""RunResult: what a run gave, as its record keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run gave, in plain JSON types.

    status: "finished", or "diverged" where a loss, of training or at the end, is not finite. headline: the key in
    `metrics` of the task's main metric, such as "accuracy".
    metrics: final numbers (finite ones only): the task's metrics, "eval_loss", "train_loss"; over the modules (standard
    deviations of the population) "stable_rank.mean" and ".std", the same of each kind, "stable_rank.attention.mean",
    "dc_share.mean", the mean of every `Diagnostic`, and what the method makes of its own numbers: of φ "active_n.mean",
    "utilisation.mean", "omega.mean" and ".std", "alpha.mean_abs", "range.share", the largest of them, and "linear_fit"
    and "nonlinear_share" (`diagnostics.linear`), of each ".mean" and ".largest";
    "convergence_exponent" (`diagnostics.convergence`), "update_smoothness"
    (`diagnostics.path`), "sharpness" (`diagnostics.sharpness`, where train.sharpness asks for it), "generalisation_gap"
    (the headline metric on up to 128 training rows less that on the held-out ones, where they are comparable);
    "parameters.trainable", ".factors", ".transfer", ".head"; "adapter.bytes", the
    size of the saved weights; "memory.peak_bytes" (of process 0) and "tokens_per_second" of training (`cost`);
    "seconds.train", ".eval" and ".observe", which do not overlap.
    curves: name -> [(step, value), ...]: "loss", "update_smoothness" so far, "stable_rank.attention" and so on at the
    snapshots and the end, and "eval_loss" and the task's metrics where the run evaluates on its way.
    modules: adapted module -> its numbers at the end, if its method has a ΔW: "kind", "stable_rank", "dc_share",
    "spectrum" (the leading σᵢ / σ₁), those of the diagnostics, and those of the method's `describe`.
    phi: adapted module -> {"z": [..], "phi": [..]}, a learned function: what φ adds to BA, f(z), on the range of BA
    (empty for methods without one). snapshots: [{"step", "stable_rank": {module: number}, "phi": as above}, ...] at the
    start and after 10 % and 50 % of the steps. landscape: `diagnostics.landscape` of the training loss, empty unless
    train.landscape asks.
    warnings: sentences for the user. data: fingerprint, row counts, what the task says of its rows, and the backbone's
    note where it has one. environment: versions, git commit, platform, threads, and the task's notes. accumulate: how
    many smaller batches made up a batch, see `run`.
    """

    status: str
    headline: str
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    phi: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    landscape: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    accumulate: int = 1
