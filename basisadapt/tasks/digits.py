"""Handwritten digits that scikit-learn includes (Alpaydin & Kaynak, 1998), without a download."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from basisadapt.tasks.image import ImageTask
from basisadapt.tasks.task import Rows, TaskData

HELD_OUT = 0.2


class Digits(ImageTask, name="vision/digits"):
    """Ten digits: 1,797 gray images of 8 × 8 pixels, of which one in five is held out."""

    headline, num_labels = "accuracy", 10
    templates = ('a photo of the number: "{}".',)

    def check(self, data_dir: Path | None) -> None:
        """Nothing to check: scikit-learn includes the data."""

    def load(self, data_dir: Path | None) -> TaskData:
        """Training and held-out rows, shuffled by a fixed seed; the 17 gray levels are scaled to 0..255."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = np.round(digits.images * 255 / 16).astype(np.uint8), digits.target
        train, held_out = Rows(list(images), labels.tolist()).mixed().split(HELD_OUT)
        mark = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        names = tuple(str(name) for name in digits.target_names)
        return TaskData(train, held_out, mark=mark, prompts=self.prompts(names), classes=names)
