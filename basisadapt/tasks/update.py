"""Real updates as targets: those of the backbone's matrices by full fine-tuning."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from basisadapt.core.errors import InputError
from basisadapt.tasks.matrix import FittedMatrix
from basisadapt.tasks.task import Rows, TaskData

FILE = "updates.safetensors"  # in the data folder


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file, identified by its sha256."""

    file: Path
    name: str
    sha256: str


class Update(FittedMatrix, name="matrix/update"):
    """A matrix of updates.safetensors in the data folder, which maps names to ΔW in the shape of the weight, float32.

    Seed n takes the n-th name in sorted order, modulo their number, so that a few seeds have different targets.
    `python benchmarks/real_updates.py NAME --matrices FILE` writes such a file, with the updates of the attention's
    matrices by full fine-tuning.
    """

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the file is there."""
        _file_in(data_dir)

    def of_seed(self, seed: int, data_dir: Path | None) -> TaskData:
        """The matrix, by file and name. Raises InputError for a file that is damaged or empty."""
        file = _file_in(data_dir)
        matrices = _read(file)
        if not matrices:
            raise InputError(f"{str(file)!r} must hold at least one matrix")
        name = sorted(matrices)[seed % len(matrices)]
        digest = hashlib.sha256(np.ascontiguousarray(matrices[name]).tobytes()).hexdigest()
        rows = Rows([StoredMatrix(file, name, digest)], [0])
        return TaskData(rows, rows, mark=f"one matrix: {name}, sha256 {digest}", about={"matrix": name})

    def given(self, row: StoredMatrix, weight: np.ndarray) -> np.ndarray:
        """The matrix. Raises InputError where the weight has another shape, or the matrix is 0 or not finite."""
        matrix: np.ndarray = _read(row.file)[row.name].astype(np.float64)
        if matrix.shape != weight.shape:
            found, expected = (" x ".join(map(str, shape)) for shape in (matrix.shape, weight.shape))
            raise InputError(f"{row.name!r} of {str(row.file)!r} is {found}, and the weight that is fitted {expected}")
        if not np.isfinite(matrix).all() or not matrix.any():
            raise InputError(f"{row.name!r} of {str(row.file)!r} must be finite and not 0")
        return matrix


def _file_in(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise InputError(f"task 'matrix/update' needs a data folder with {FILE}: --data-dir")
    if not (file := data_dir / FILE).is_file():
        raise InputError(f"task 'matrix/update' needs {FILE} in the data folder {str(data_dir)!r}")
    return file


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        matrices: dict[str, np.ndarray] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(file)!r} cannot be read as safetensors: {error}") from error
    return matrices
