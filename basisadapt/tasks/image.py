"""Image classification: an image and the index of its class."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
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

# Of ImageNet's red, green and blue; for every backbone, CLIP too, as the paper states (appendix D).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: its share of the area, its width to its height
ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS + 1  # uniform numbers for one image: four for each attempt at a crop, one for the flip
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none of which Pillow opens by starting a program
READERS = min(16, os.cpu_count() or 1)  # threads that decode a batch; Pillow lets them run side by side

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


class ImageTask(Task):
    """Inputs are images, labels class indices. An image is the path of a file, or a function without arguments that
    gives a PIL image, opened only when a batch has its turn; or a file's bytes; or an array of bytes, (height, width)
    or (height, width, 3); or a PIL image.

    templates: sentences with {} for a class's name, for backbones with a text tower (`data.head` zero_shot).
    """

    templates: ClassVar[tuple[str, ...]] = ("a photo of a {}.",)

    def __init__(self, settings: DataSettings | None = None) -> None:
        super().__init__(settings)
        self.form = "zero_shot" if self.settings.head == "zero_shot" else "image"

    def prompts(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The sentences about each class; of a name with synonyms, as in ImageNet, the first counts."""
        plain = [name.split(",")[0].replace("_", " ").strip() for name in names]
        return tuple(tuple(template.format(name) for template in self.templates) for name in plain)

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """Pixels of the image processor's resolution, (3, side, side), made when they are asked for.

        Training sees a random crop, flipped or not, drawn from torch's global generator; evaluation the largest square
        in the middle. Both are resampled bicubically and normalised by MEAN and STD.
        """
        return _Pixels(rows, resolution(processor), training)

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """Stacks."""
        return _stacked

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The head's loss and outputs."""
        output = model(**batch)
        return output.loss, output.logits

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """Accuracy; of more than ten classes also top-5, the share of rows whose class is among the five likeliest."""
        labels = np.asarray(rows.labels)
        measured = {"accuracy": float(np.mean(scores.argmax(axis=-1) == labels))}
        if self.num_labels > 10:
            likeliest = np.argpartition(scores, -5, axis=-1)[:, -5:]
            measured["accuracy_top5"] = float(np.mean((likeliest == labels[:, None]).any(axis=-1)))
        return measured


class _Pixels(Sequence[Example]):
    """Examples of rows, none of them kept; a batch is decoded at once. The same draws give the same pixels, whatever
    the number of threads."""

    def __init__(self, rows: Rows, side: int, training: bool) -> None:
        self._rows, self._side, self._training = rows, side, training

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        indices = range(len(self))[index]
        return self.__getitems__(indices) if isinstance(index, slice) else self.__getitems__([indices])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """The examples of a batch; torch's DataLoader asks so."""
        draws = torch.rand(len(indices), DRAWS).tolist() if self._training else [None] * len(indices)
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._example, indices, draws))

    def _example(self, index: int, draws: list[float] | None) -> Example:
        image = decode(self._rows.inputs[index])
        box = centre_box(*image.size) if draws is None else random_box(*image.size, draws)
        flip = draws is not None and draws[-1] < 0.5
        return {"pixel_values": pixels(image, box, self._side, flip), "labels": int(self._rows.labels[index])}


def resolution(processor: Any) -> int:
    """The side in pixels of the squares that a model takes, from its image processor. Raises InputError for none."""
    size = getattr(processor, "crop_size", None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    if side is None:
        raise InputError(f"the backbone's image processor gives no height or shortest_edge but {dict(size)}")
    return int(side)


def decode(image: Any) -> Image.Image:
    """The image in RGB, upright. Raises InputError naming a file that is none of FORMATS, or is cut short."""
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
    """The image upright, as its EXIF says, and in RGB; of 16 bits the upper 8 count."""
    long = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    with suppress(Exception):  # a damaged EXIF says nothing; damaged pixels are found below
        image = ImageOps.exif_transpose(image)
    if long:  # Pillow would cut off what is above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def centre_box(width: int, height: int) -> Box:
    """The largest square in the middle: resizing to it is resizing the shorter side, then cropping the middle."""
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """A crop of a random area and shape at a random place, whole pixels, from uniform draws in [0, 1).

    An attempt takes an area of SCALE · width · height and a ratio of log-uniform RATIO, and holds if it fits; after
    ATTEMPTS that do not, the largest crop in the middle whose ratio is in RATIO. Source: Szegedy et al. (2015).
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
    """The box resampled bicubically to a square, mirrored if `flip`, normalised: float32, shape (3, side, side).

    Resampling is antialiased. At the box's edges it looks at what lies beyond, as if the whole image had been resized
    and then cropped.
    """
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    values = np.asarray(square, dtype=np.float32) / 255
    values = (values[:, ::-1] if flip else values).transpose(2, 0, 1)
    mean, std = (torch.tensor(constants)[:, None, None] for constants in (MEAN, STD))
    return (torch.from_numpy(np.ascontiguousarray(values)) - mean) / std


def _stacked(examples: list[Example]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
