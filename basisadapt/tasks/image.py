"""Image classification: an image and the index of its class."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from basisadapt.core.errors import InputError
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import Example, Rows, Task

# Of ImageNet's red, green and blue; used for every backbone, including CLIP, as the paper states (appendix D).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: its share of the area, and width / height
ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS + 1  # uniform numbers for one image: four for each attempt at a crop, one for the flip
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow opens none of them by starting another program
READERS = min(16, os.cpu_count() or 1)  # threads that decode a batch; Pillow releases the GIL

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


class ImageTask(Task):
    """Inputs are images, labels class indices. An image is one of:

    - the path of a file, or a function without arguments that returns a PIL image; opened only for its batch;
    - the bytes of a file;
    - an array of uint8, shape (height, width) or (height, width, 3);
    - a PIL image.

    templates: sentences with {} for the name of a class, for backbones with a text tower (data.head "zero_shot").
    """

    templates: ClassVar[tuple[str, ...]] = ("a photo of a {}.",)

    def __init__(self, settings: DataSettings | None = None) -> None:
        super().__init__(settings)
        self.form = "zero_shot" if self.settings.head == "zero_shot" else "image"

    def prompts(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The sentences about each class. Of a name with synonyms, as in ImageNet, the first is used."""
        plain = [name.split(",")[0].replace("_", " ").strip() for name in names]
        return tuple(tuple(template.format(name) for template in self.templates) for name in plain)

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """Pixels at the image processor's resolution, (3, side, side), computed on access.

        Training uses a random crop, flipped at random, drawn from torch's global generator; evaluation uses the largest
        centered square. Both are resampled bicubically and normalized by MEAN and STD. Raises InputError for an
        unreadable image on access.
        """
        return _Pixels(rows, resolution(processor), training)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The accuracy; with more than ten classes also "accuracy_top5", for a class among the five likeliest.

        scores: logits (rows, num_labels).
        """
        labels = np.asarray(rows.labels)
        measured = {"accuracy": float(np.mean(scores.argmax(axis=-1) == labels))}
        if self.num_labels > 10:
            likeliest = np.argpartition(scores, -5, axis=-1)[:, -5:]
            measured["accuracy_top5"] = float(np.mean((likeliest == labels[:, None]).any(axis=-1)))
        return measured


class _Pixels(Sequence[Example]):
    """The examples of rows, made on access and not cached; the images of a batch are decoded in parallel.

    Random numbers are drawn before, so the pixels do not depend on the number of threads.
    """

    def __init__(self, rows: Rows, side: int, training: bool) -> None:
        self._rows, self._side, self._training = rows, side, training

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        indices = range(len(self))[index]
        return self.__getitems__(indices) if isinstance(index, slice) else self.__getitems__([indices])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """The examples of a batch; torch's DataLoader calls it."""
        draws = torch.rand(len(indices), DRAWS).tolist() if self._training else [None] * len(indices)
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._example, indices, draws))

    def _example(self, index: int, draws: list[float] | None) -> Example:
        image = decode(self._rows.inputs[index])
        box = centre_box(*image.size) if draws is None else random_box(*image.size, draws)
        flip = draws is not None and draws[-1] < 0.5
        return {"pixel_values": pixels(image, box, self._side, flip), "labels": int(self._rows.labels[index])}


def resolution(processor: Any) -> int:
    """The side, in pixels, of a model's square inputs, from its image processor. Raises InputError if it gives none."""
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    if side is None:
        raise InputError(f"the backbone's image processor gives no height or shortest_edge but {dict(size)}")
    return int(side)


def decode(image: Any) -> Image.Image:
    """The image in RGB, upright; its forms: `ImageTask`. Raises InputError naming a file that cannot be decoded.

    Files must have one of FORMATS.
    """
    if callable(image):
        image = image()
    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, np.ndarray):
        return _rgb(Image.fromarray(image))
    name = "of a data set" if isinstance(image, bytes) else repr(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as file:
            return _rgb(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name} cannot be read: {' '.join(str(error).split())}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, rotated as its EXIF data says; of 16-bit values the upper 8 bits are used."""
    long = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    with suppress(Exception):  # damaged EXIF data is ignored; damaged pixels are found below
        image = ImageOps.exif_transpose(image)
    if long:  # Pillow would clip values above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def centre_box(width: int, height: int) -> Box:
    """The largest centered square of an image, in pixels; resampling it equals resizing, then center cropping."""
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """A crop of random area, shape and position, in whole pixels.

    An attempt draws an area, uniform in SCALE · width · height, and a ratio of width to height, log-uniform in RATIO.
    The first that fits is used; after ATTEMPTS that do not, the largest centered crop with a ratio in RATIO. draws:
    DRAWS uniform numbers in [0, 1). Source: Szegedy et al. (2015).
    """
    low, high = (math.log(ratio) for ratio in RATIO)
    for area_draw, ratio_draw, left_draw, upper_draw in zip(*[iter(draws[: 4 * ATTEMPTS])] * 4, strict=True):
        area = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(left_draw * (width - w + 1)), int(upper_draw * (height - h + 1))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def pixels(image: Image.Image, box: Box, side: int, flip: bool) -> Tensor:
    """The box, resampled bicubically to a square, mirrored if `flip`, and normalized: float32, shape (3, side, side).

    Resampling is antialiased. At the edges of the box it uses the pixels beyond, as if the whole image had been resized
    and then cropped.
    """
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    values = np.asarray(square, dtype=np.float32) / 255
    values = (values[:, ::-1] if flip else values).transpose(2, 0, 1)
    mean, std = (torch.tensor(constants)[:, None, None] for constants in (MEAN, STD))
    return (torch.from_numpy(np.ascontiguousarray(values)) - mean) / std
