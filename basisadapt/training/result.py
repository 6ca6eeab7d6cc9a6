"""RunResult: the result of a run, as it is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """The result of a run, in plain JSON types.

    - `status` (str): "finished", or "diverged" if a loss, during training or at the end, was not finite.
    - `headline` (str): the key in `metrics` of the task's main metric, such as "accuracy".
    - `metrics`: final numbers by name, only finite ones; see below.
    - `curves`: name to [(step, value), ...]: "loss"; "update_smoothness" up to each step; "stable_rank.attention" and
      so on at the snapshots and the end; "eval_loss" and the task's metrics if the run evaluates during training.
    - `modules`: adapted module to its numbers at the end, if the method has a ΔW: "kind", "stable_rank", "dc_share",
      "spectrum" (the leading σᵢ / σ₁), those of the diagnostics, and those of the method's `describe`
      and `measure`.
    - `phi`: adapted module to {"z": [...], "phi": [...]}, the learned function f(z), what φ adds to BA, on the range of
      BA; empty for methods without one.
    - `snapshots`: [{"step", "stable_rank": {module: number}, "phi": as above}, ...] at the start and after 10 % and
      50 % of the steps.
    - `landscape`: `diagnostics.landscape` of the training loss; empty without train.landscape.
    - `warnings`: sentences for the user.
    - `data`: the fingerprint, the row counts, what the task reports of its rows, and the backbone's note if it has one.
    - `environment`: versions, git commit, platform, threads, and the task's notes.
    - `accumulate` (int ≥ 1): the number of smaller batches that made up a batch, see `run`.

    The metrics are:

    - the task's own, "eval_loss" and "train_loss";
    - over the modules (with population standard deviations): "stable_rank.mean" and ".std", the same for each kind
      ("stable_rank.attention.mean"), "dc_share.mean", and the mean of every `Diagnostic`;
    - the method's summary of its own numbers, for φ "active_n.mean", "utilisation.mean", "omega.mean" and ".std",
      "alpha.mean_abs", "range.share", the largest over the modules, and "linear_fit" and "nonlinear_share"
      (`diagnostics.linear`), each as ".mean" and ".largest";
    - "convergence_exponent" (`diagnostics.convergence`), "update_smoothness" (`diagnostics.path`), and "sharpness"
      (`diagnostics.sharpness`, with train.sharpness);
    - "generalisation_gap": the headline metric on up to 128 training rows minus that on the held-out rows, if the task
      can compare them;
    - "parameters.trainable", ".factors", ".transfer" and ".head"; "adapter.bytes", the size of the saved weights;
    - "memory.peak_bytes" of process 0 and "tokens_per_second", both of training (`training.cost`);
    - "seconds.train", ".eval" and ".observe", which do not overlap.
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
