"""Given matrices: how much of an update can a method represent?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch

from basisadapt.tasks.drawn import DrawnTask, SeededTask
from basisadapt.tasks.task import Example, Rows

NUMBERS = 2**32  # the seeds of targets lie below
RANKS = tuple(2**i for i in range(8))
DENSITY = 0.02  # of the entries of a sparse target
BLOCKS = 8
LOW_RANK = 4  # of the matrix that a function is taken of
GROUP, LEVELS = 64, 7  # weights that share a scale, and the largest number of a signed 4-bit one


class FittedMatrix(SeededTask):
    """Fit ΔW of one weight to a target T of its shape (m, n), scaled to ‖T‖ = 1, without noise or held-out rows.

    There is one row, the matrix; its loss is ‖ΔW − T‖² / ‖T‖². Metrics: "energy", 1 − loss, the share of the target's
    energy that is captured; "optimum.K" for K = 1, 2, 4, ..., 128, what the best matrix of rank K captures, by T's
    singular values (Eckart & Young, 1936), the bound of BA. Both in float64.
    """

    form, headline, num_labels = "weight", "energy", 1

    @abstractmethod
    def given(self, row: Any, weight: np.ndarray) -> np.ndarray:
        """T of a row for a weight of shape (m, n), both in float64; its scale does not matter. Raises InputError."""

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """W and T, in float32."""
        targets = (torch.from_numpy(self._target(row, processor)).float() for row in rows.inputs)
        return [{"weight": processor.weight, "target": target, "labels": 0} for target in targets]

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The energy that ΔW, shape (1, m, n), captures, and the optimum of every rank."""
        target = self._target(rows.inputs[0], processor)
        captured = np.cumsum(np.linalg.svd(target, compute_uv=False) ** 2)
        optimum = {f"optimum.{rank}": float(captured[min(rank, len(captured)) - 1]) for rank in RANKS}
        return {"energy": 1 - float(np.sum((scores[0].astype(np.float64) - target) ** 2)), **optimum}

    def _target(self, row: Any, processor: Any) -> np.ndarray:
        target = self.given(row, processor.weight.double().numpy())
        return cast(np.ndarray, target / np.linalg.norm(target))


class MatrixTask(FittedMatrix, DrawnTask):
    """A target that is drawn at random."""

    @abstractmethod
    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n), both in float64; its scale does not matter."""

    @property
    def drawn_as(self) -> str:
        """The name of the class."""
        return f"one matrix: {type(self).__name__}"

    def draw(self, generator: np.random.Generator) -> Rows:
        """The seed of the target."""
        return Rows([int(generator.integers(NUMBERS))], [0])

    def given(self, row: Any, weight: np.ndarray) -> np.ndarray:
        """The target with the seed `row`."""
        return self.target(np.random.default_rng(row), weight)


class Gaussian(MatrixTask, name="matrix/gaussian"):
    """Independent normal entries: a flat spectrum."""

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        return generator.normal(size=weight.shape)


class Sparse(MatrixTask, name="matrix/sparse"):
    """Normal entries in 2 % of the places, zero in the others."""

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        kept = generator.random(weight.shape) < DENSITY
        return np.where(kept, generator.normal(size=weight.shape), 0.0)


class Block(MatrixTask, name="matrix/block"):
    """Eight blocks of normal entries on the diagonal, zero elsewhere."""

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        rows, columns = (np.arange(size) * BLOCKS // size for size in weight.shape)
        kept = rows[:, None] == columns
        return np.where(kept, generator.normal(size=weight.shape), 0.0)


class Sign(MatrixTask, name="matrix/sign"):
    """The signs of a matrix of rank 4, a function of each entry: of full rank for BA, of rank 4 for such a function."""

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        B, A = (generator.normal(size=(size, LOW_RANK)) for size in weight.shape)
        return np.sign(B @ A.T)


class Rounding(MatrixTask, name="matrix/rounding"):
    """W − Q(W), Q rounding to 4 bits: s round(w / s) with s = max |w| / 7 over 64 weights of an output.

    The groups of inputs are drawn. This is the error of a quantized weight that an adapter has to repair. Source: Li et
    al. (2024), LoftQ.
    """

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        error, order = np.empty_like(weight), generator.permutation(weight.shape[1])
        for start in range(0, len(order), GROUP):
            columns = order[start : start + GROUP]
            group = weight[:, columns]
            scale = np.abs(group).max(axis=1, keepdims=True) / LEVELS
            error[:, columns] = group - scale * np.round(group / scale)
        return error


class Power(MatrixTask):
    """σᵢ ∝ i^−exponent with random singular vectors."""

    exponent: ClassVar[float]

    def __init_subclass__(cls, *, exponent: float | None = None, **kwargs: Any) -> None:
        """Register the class as `Task` does, with its exponent if it is another than its base's."""
        super().__init_subclass__(**kwargs)
        if exponent is not None:
            cls.exponent = exponent

    def target(self, generator: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """T for a weight of shape (m, n)."""
        U, V = (np.linalg.qr(generator.normal(size=(size, min(weight.shape))))[0] for size in weight.shape)
        sigma: np.ndarray = np.arange(1, U.shape[1] + 1) ** -self.exponent
        return cast(np.ndarray, U * sigma @ V.T)


class Flat(Power, name="matrix/flat", exponent=0.0):
    """All σᵢ equal."""


class PowerQuarter(Power, name="matrix/power_quarter", exponent=0.25):
    """σᵢ ∝ i^−0.25."""


class PowerHalf(Power, name="matrix/power_half", exponent=0.5):
    """σᵢ ∝ i^−0.5."""


class PowerThreeQuarters(Power, name="matrix/power_three_quarters", exponent=0.75):
    """σᵢ ∝ i^−0.75."""


class Power1(Power, name="matrix/power_1", exponent=1.0):
    """σᵢ ∝ 1 / i."""


class PowerThreeHalves(Power, name="matrix/power_three_halves", exponent=1.5):
    """σᵢ ∝ i^−1.5."""


class Power2(Power, name="matrix/power_2", exponent=2.0):
    """σᵢ ∝ 1 / i²."""
