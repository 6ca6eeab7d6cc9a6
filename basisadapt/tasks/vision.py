"""The paper's photograph data sets (Tables 8 and 9): ImageNet-1k, CIFAR-100, Flowers, SUN and Pets.

They are read from image folders in `--data-dir`, `vision/cifar100/{train,test}/<class>/*.jpg`, or from the hub.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from basisadapt.core.errors import InputError, refusing, unknown
from basisadapt.tasks.hub import rows_from_hub
from basisadapt.tasks.image import ImageTask, decode
from basisadapt.tasks.tables import check_columns
from basisadapt.tasks.task import Rows, TaskData, readable_folder

SUFFIXES = (".jpg", ".jpeg", ".png")
PARTS = ("train", "test")
WORDNET_ID = re.compile(r"n\d{8}")  # the names of ImageNet's folders


class Photographs(ImageTask):
    """A data set of photographs. The subclasses only set these attributes:

    - `folder` (str): under `vision/`.
    - `hub` (str): its id on the hub.
    - `image` (str, default "image"), `label` (str, default "label"): its columns there.
    - `held_out` (str, default "test"): its split to evaluate on there.

    A class has the name of its folder, or that on the hub. If the folders' names mean nothing, as in ImageNet, a file
    `classes.txt` next to them has a line for each: the folder, a space, the name.
    """

    headline = "accuracy"
    folder: ClassVar[str]
    hub: ClassVar[str]
    image: ClassVar[str] = "image"
    label: ClassVar[str] = "label"
    held_out: ClassVar[str] = "test"

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless training and test folders have images of each class, or data_dir is None (hub)."""
        if data_dir is None:
            return
        folder = readable_folder(data_dir) / "vision" / self.folder
        classes, others = (_subfolders(folder / part) for part in PARTS)
        if odd := sorted(set(classes) ^ set(others)):
            raise InputError(f"{str(folder)!r} has class {odd[0]!r} in only one of {' and '.join(PARTS)}")
        if len(classes) != self.num_labels:
            raise InputError(f"{str(folder)!r} has {len(classes)} classes, expected {self.num_labels}")
        for part, name in itertools.product(PARTS, classes):
            if not _images(folder / part / name):
                raise InputError(f"class folder {str(folder / part / name)!r} has no image ({', '.join(SUFFIXES)})")
        nameless = [name for name in _names(folder, classes) if WORDNET_ID.fullmatch(name)]
        if self.form == "zero_shot" and nameless:
            raise InputError(f"data.head zero_shot needs names of classes: {str(folder / 'classes.txt')!r} is missing")

    @property
    def on_hub(self) -> Sequence[str]:
        """`hub`."""
        return (self.hub,)

    def load(self, data_dir: Path | None) -> TaskData:
        """Training and test rows, shuffled by a fixed seed. No image is opened; files of other suffixes are skipped.

        Raises InputError for a data set that differs from what is expected.
        """
        if data_dir is None:
            return self._from_hub()
        self.check(data_dir)
        folder = data_dir / "vision" / self.folder
        classes = _subfolders(folder / PARTS[0])
        names = _names(folder, classes)
        (train, seen), (held_out, unseen) = (_read(folder / part, classes) for part in PARTS)
        return TaskData(
            train, held_out, mark=f"{seen} {unseen} {names}", prompts=self.prompts(names), classes=tuple(names)
        )

    def _from_hub(self) -> TaskData:
        parts = rows_from_hub(f"task vision/{self.folder}", self.hub)
        for split in ("train", self.held_out):
            if split not in parts:
                raise InputError(f"hub data set {self.hub!r}: {unknown('split', split, parts)}")
        train, held_out = parts["train"], parts[self.held_out]
        check_columns(f"hub data set {self.hub!r}", train.column_names, [self.image, self.label])
        names = tuple(getattr(train.features[self.label], "names", ()))
        mark = f"{train._fingerprint} {held_out._fingerprint}"
        rows = self._hub_rows(train), self._hub_rows(held_out)
        return TaskData(*rows, mark=mark, prompts=self.prompts(names), classes=names)

    def _hub_rows(self, part: Any) -> Rows:
        import datasets

        labels = np.asarray(part[self.label])
        if labels.min() < 0 or labels.max() >= self.num_labels:
            raise InputError(f"hub data set {self.hub!r} has labels outside 0 to {self.num_labels - 1}")
        column = part.select_columns([self.image])
        if isinstance(column.features[self.image], datasets.Image):  # files, decoded as those of a folder are
            column = column.cast_column(self.image, datasets.Image(decode=False))
        images = [functools.partial(_decoded, column, row) for row in range(len(labels))]
        return Rows(images, labels.tolist()).mixed()


def _decoded(images: Any, row: int) -> Any:
    """The image in a row of a hub data set with one column, decoded on each call. Raises InputError naming the row."""
    try:
        (image,) = images[row].values()
        if isinstance(image, dict):
            image = image["bytes"] or image["path"]
        if image is None:
            raise ValueError("there is none")
        return decode(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the image in row {row} cannot be read: {' '.join(str(error).split())}") from error


def _subfolders(folder: Path) -> list[str]:
    with refusing(f"image folder {str(folder)!r} cannot be read"):
        return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _images(folder: Path) -> list[os.DirEntry[str]]:
    with refusing(f"class folder {str(folder)!r} cannot be read"), os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name.lower().endswith(SUFFIXES)), key=lambda entry: entry.name)


def _read(folder: Path, classes: list[str]) -> tuple[Rows, str]:
    """The files of the training or test folder and their classes, and a hash of their names and sizes."""
    files = [(entry, label) for label, name in enumerate(classes) for entry in _images(folder / name)]
    content = hashlib.sha256()
    for entry, label in files:
        if (size := entry.stat().st_size) == 0:
            raise InputError(f"image {entry.path!r} is empty")
        content.update(os.fsencode(f"{classes[label]}/{entry.name} {size}\n"))
    rows = Rows([entry.path for entry, _ in files], [label for _, label in files])
    return rows.mixed(), content.hexdigest()


def _names(folder: Path, classes: list[str]) -> list[str]:
    """The names of the classes, from classes.txt if it exists, or else of their folders. Raises InputError."""
    path = folder / "classes.txt"
    if not path.is_file():
        return classes
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read as UTF-8: {error}") from error
    names = {name: called.strip() for name, _, called in (line.partition(" ") for line in lines)}
    if missing := [name for name in classes if not names.get(name)]:
        raise InputError(f"{str(path)!r} does not name class {missing[0]!r}")
    return [names[name] for name in classes]


# Ids and columns on the hub are untested except for CIFAR-100's: the hub could not be reached when they were written.
# If a data set differs, the message says what it has.


class ImageNet(Photographs, name="vision/imagenet"):
    """ImageNet-1k, evaluated on its validation set, with the 7 of CLIP's 80 templates that its authors recommend."""

    folder, hub, held_out, num_labels = "imagenet", "ILSVRC/imagenet-1k", "validation", 1000
    templates = (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )


class CIFAR100(Photographs, name="vision/cifar100"):
    """CIFAR-100 with its 100 fine classes and CLIP's 18 templates."""

    folder, hub, image, label, num_labels = "cifar100", "uoft-cs/cifar100", "img", "fine_label", 100
    templates = tuple(
        template.format(article, "{}")
        for article in ("a", "the")
        for template in (
            "a photo of {} {}.",
            "a blurry photo of {} {}.",
            "a black and white photo of {} {}.",
            "a low contrast photo of {} {}.",
            "a high contrast photo of {} {}.",
            "a bad photo of {} {}.",
            "a good photo of {} {}.",
            "a photo of {} small {}.",
            "a photo of {} big {}.",
        )
    )


class Flowers102(Photographs, name="vision/flowers102"):
    """Oxford Flowers, 102 kinds of flowers."""

    folder, hub, num_labels = "flowers102", "dpdl-benchmark/oxford_flowers102", 102
    templates = ("a photo of a {}, a type of flower.",)


class SUN397(Photographs, name="vision/sun397"):
    """SUN397, photographs of 397 kinds of scenes."""

    folder, hub, num_labels = "sun397", "tanganke/sun397", 397
    templates = ("a photo of a {}.", "a photo of the {}.")


class Pets(Photographs, name="vision/pets"):
    """Oxford-IIIT Pets, 37 breeds."""

    folder, hub, num_labels = "pets", "timm/oxford-iiit-pet", 37
    templates = ("a photo of a {}, a type of pet.",)
