"""GLUE (Wang et al., 2019), from a local folder in the layout `glue/CoLA/train.tsv` or from the hub.

Development sets are the evaluation sets, as usual where the test labels are withheld. Needs `--data-dir`, or, without
it, the hub's `nyu-mll/glue`. Every row of a file counts: one that is malformed is an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from basisadapt.core.errors import InputError, unknown
from basisadapt.tasks import metrics
from basisadapt.tasks.hub import ask_hub
from basisadapt.tasks.split import split
from basisadapt.tasks.tables import Table, read_table
from basisadapt.tasks.task import Rows, TaskData, readable_folder
from basisadapt.tasks.text import TextTask

HUB = "nyu-mll/glue"


class Glue(TextTask):
    """One GLUE task. The subclasses below are data.

    folder: the folder under `glue/`; text, label: columns of its files, whose names are `header` where a file does not
    begin with them; classes: the labels as written in the files, none for a regression; hub_text: the columns of the
    texts on the hub. splits_dev: a folder without train.tsv is taken too: four in five rows of dev.tsv are trained on,
    the others evaluated on, chosen by their first text.
    """

    folder: ClassVar[str]
    text: ClassVar[tuple[str, ...]]
    label: ClassVar[str] = "label"
    header: ClassVar[tuple[str, ...] | None] = None
    classes: ClassVar[tuple[str, ...]]
    hub_text: ClassVar[tuple[str, ...]]
    splits_dev: ClassVar[bool] = False

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the files are there, or the hub is to be asked."""
        if data_dir is None:
            return
        readable_folder(data_dir)
        for path in self._files(data_dir):
            if not path.is_file():
                raise InputError(f"data folder {str(data_dir)!r} has no {path.relative_to(data_dir)}")

    def sources(self, data_dir: Path | None) -> Sequence[str]:
        """GLUE's own, without a folder."""
        return (HUB,) if data_dir is None else ()

    def load(self, data_dir: Path | None) -> TaskData:
        """Train and development rows, the train rows mixed by a fixed seed."""
        if data_dir is None:
            return self._from_hub()
        self.check(data_dir)
        parts = [self._read(path) for path in self._files(data_dir)]
        if len(parts) == 1:
            return TaskData(*split(parts[0]), about={"split": "dev only, 4 of 5 rows train"})
        return TaskData(parts[0].mixed(), parts[1])

    def _files(self, data_dir: Path) -> list[Path]:
        train, dev = (data_dir / "glue" / self.folder / f"{part}.tsv" for part in ("train", "dev"))
        return [dev] if self.splits_dev and not train.exists() else [train, dev]

    def _read(self, path: Path) -> Rows:
        table = read_table(path, (*self.text, self.label), self.header)
        texts = [table.columns[name] for name in self.text]
        return Rows(_texts(texts), [self._label(table, row) for row in range(len(table))])

    def _label(self, table: Table, row: int) -> Any:
        value = table.columns[self.label][row]
        if self.classes:
            if value not in self.classes:
                raise table.error(row, str(unknown("label", value, self.classes)))
            return self.classes.index(value)
        try:
            score = float(value)
        except ValueError:
            score = np.nan
        if not np.isfinite(score):
            raise table.error(row, f"label {value!r} is not a finite number")
        return score

    def _from_hub(self) -> TaskData:
        subset = type(self).__name__.lower()
        try:
            parts = ask_hub(HUB, subset)
        except InputError as error:
            raise InputError(f"task glue/{subset} needs --data-dir or the hub: {error}") from error

        def rows(part: Any) -> Rows:
            return Rows(_texts([list(part[name]) for name in self.hub_text]), list(part["label"]))

        return TaskData(rows(parts["train"]).mixed(), rows(parts["validation"]))

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, F1 of the second class and Matthews' correlation; Pearson and Spearman of a regression."""
        from sklearn.metrics import f1_score

        if not self.classes:
            return metrics.of_numbers(scores, labels)
        return {**metrics.of_classes(scores, labels), "f1": float(f1_score(labels, scores.argmax(axis=-1)))}


def _texts(columns: list[Any]) -> list[Any]:
    """One column of texts as it is, two as pairs."""
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))


class CoLA(Glue, name="glue/cola"):
    """Is the sentence grammatical? Matthews' correlation."""

    folder, header, text = "CoLA", ("source", "label", "mark", "sentence"), ("sentence",)
    classes, hub_text = ("0", "1"), ("sentence",)
    headline, num_labels = "matthews", 2


class SST2(Glue, name="glue/sst2"):
    """Is the sentence positive? Accuracy."""

    folder, text, classes, hub_text = "SST-2", ("sentence",), ("0", "1"), ("sentence",)
    headline, num_labels = "accuracy", 2


class MRPC(Glue, name="glue/mrpc"):
    """Do the sentences say the same? Accuracy; F1, which GLUE also gives, is recorded."""

    folder, text, label, classes = "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class RTE(Glue, name="glue/rte"):
    """Does the first text entail the second? Accuracy."""

    folder, text, classes = "RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class QNLI(Glue, name="glue/qnli"):
    """Does the sentence answer the question? Accuracy. Rows of one question stay together where dev.tsv is split."""

    folder, text, classes = "QNLI", ("question", "sentence"), ("entailment", "not_entailment")
    hub_text, splits_dev = ("question", "sentence"), True
    headline, num_labels = "accuracy", 2


class STSB(Glue, name="glue/stsb"):
    """How alike are the sentences, 0 to 5? Pearson's correlation."""

    folder, text, label, classes = "STS-B", ("sentence1", "sentence2"), "score", ()
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "pearson", 1
