"""Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017), from its four IDX files."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import zlib
from pathlib import Path

import numpy as np

from basisadapt.core.errors import InputError
from basisadapt.tasks.image import ImageTask
from basisadapt.tasks.task import Rows, TaskData, readable_folder

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class FashionMNIST(ImageTask, name="vision/fashion_mnist"):
    """Ten kinds of clothes: gray images of 28 × 28 pixels, read from `--data-dir`.

    The files, such as train-images-idx3-ubyte.gz, are in `vision/fashion_mnist`, or in `fashion-mnist` as in Debian's
    package dataset-fashion-mnist, whose data folder is /usr/share/datasets.
    """

    headline, num_labels = "accuracy", len(NAMES)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the four files exist."""
        self._files(data_dir)

    def load(self, data_dir: Path | None) -> TaskData:
        """Training and test rows, shuffled by a fixed seed. Raises InputError naming a damaged file."""
        (train, seen), (held_out, unseen) = (self._read(*files) for files in self._files(data_dir))
        return TaskData(train, held_out, mark=seen + unseen, prompts=self.prompts(NAMES), classes=NAMES)

    def _files(self, data_dir: Path | None) -> list[tuple[Path, Path]]:
        """The files of images and labels, of the training and of the test rows. Raises InputError if one is missing."""
        if data_dir is None:
            raise InputError("task vision/fashion_mnist needs --data-dir, a folder with vision/fashion_mnist")
        places = [readable_folder(data_dir) / "vision" / "fashion_mnist", data_dir / "fashion-mnist"]
        folder = next((place for place in places if place.is_dir()), places[0])
        files = [
            (folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
            for part in ("train", "t10k")
        ]
        for path in itertools.chain(*files):
            if not path.is_file():
                raise InputError(f"data folder {str(data_dir)!r} has no {path.relative_to(data_dir)}")
        return files

    def _read(self, images_file: Path, labels_file: Path) -> tuple[Rows, str]:
        images, labels = read_idx(images_file), read_idx(labels_file)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise InputError(
                f"{str(images_file)!r} and {labels_file.name} have shapes {images.shape} and {labels.shape}, "
                "expected (n, height, width) and (n,)"
            )
        if labels.max() >= self.num_labels:
            raise InputError(f"{str(labels_file)!r} has label {labels.max()}, expected 0 to {self.num_labels - 1}")
        mark = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        return Rows(list(images), labels.tolist()).mixed(), mark


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped IDX file, in the shape that its header states, uint8.

    The layout is: bytes 0, 0, 8, the number of axes, their lengths as big-endian uint32, and the data. Raises
    InputError naming a file that is not of this format, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(path)!r} cannot be unzipped: {error}") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\0\0\x08" or len(content) < start:
        begin = content[:4].hex(" ") or "nothing"
        raise InputError(f"{str(path)!r} is not an IDX file of bytes: it begins with {begin}")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != math.prod(shape) or 0 in shape:
        raise InputError(f"{str(path)!r} has {len(content) - start} bytes of data, expected {shape} of them")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
