"""GLUE (Wang et al., 2019), from a local folder in the layout `glue/CoLA/train.tsv` or from the hub.

Evaluation uses the development sets, as usual, since the test labels are withheld. Without `--data-dir`, the data is
`nyu-mll/glue` on the hub. No row of a file is skipped: a malformed one raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from basisadapt.core.errors import InputError, unknown
from basisadapt.tasks import metrics
from basisadapt.tasks.hub import rows_from_hub
from basisadapt.tasks.split import split
from basisadapt.tasks.tables import DataColumns, read_table
from basisadapt.tasks.task import Rows, TaskData, readable_folder
from basisadapt.tasks.text import TextTask

HUB = "nyu-mll/glue"


class Glue(TextTask):
    """One GLUE task. The subclasses only set these attributes:

    - `folder` (str): under `glue/`.
    - `text`: the columns of the texts in the files.
    - `label` (str, default "label"): the column of the label.
    - `header` (default None): the names of all columns, if the files do not begin with them.
    - `classes`: the labels as written in the files; empty for a regression.
    - `names` (default empty): the names of the classes, where the files have numbers.
    - `hub_text`: the columns of the texts on the hub.
    - `splits_dev` (bool, default False): accept a folder without train.tsv; four in five rows of dev.tsv are then
      trained on, and the others evaluated on, chosen by a hash of their first text.
    """

    folder: ClassVar[str]
    text: ClassVar[tuple[str, ...]]
    label: ClassVar[str] = "label"
    header: ClassVar[tuple[str, ...] | None] = None
    classes: ClassVar[tuple[str, ...]]
    names: ClassVar[tuple[str, ...]] = ()
    hub_text: ClassVar[tuple[str, ...]]
    splits_dev: ClassVar[bool] = False
    on_hub = (HUB,)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the files exist, or the hub is used (data_dir is None)."""
        if data_dir is None:
            return
        readable_folder(data_dir)
        for path in self._files(data_dir):
            if not path.is_file():
                raise InputError(f"data folder {str(data_dir)!r} has no {path.relative_to(data_dir)}")

    def load(self, data_dir: Path | None) -> TaskData:
        """Training rows, shuffled by a fixed seed, and development rows. Raises InputError naming file and row."""
        if data_dir is None:
            subset = type(self).__name__.lower()
            hub = rows_from_hub(f"task glue/{subset}", HUB, subset)
            train, dev = (_rows(hub[part], self.hub_text, hub[part]["label"]) for part in ("train", "validation"))
            return TaskData(train.mixed(), dev, classes=self._names)
        self.check(data_dir)
        parts = [self._read(path) for path in self._files(data_dir)]
        if len(parts) == 1:
            return TaskData(*split(parts[0]), about={"split": "dev only, 4 of 5 rows train"}, classes=self._names)
        return TaskData(parts[0].mixed(), parts[1], classes=self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.names or self.classes

    def _files(self, data_dir: Path) -> list[Path]:
        train, dev = (data_dir / "glue" / self.folder / f"{part}.tsv" for part in ("train", "dev"))
        return [dev] if self.splits_dev and not train.exists() else [train, dev]

    def _read(self, path: Path) -> Rows:
        table = read_table(path, (*self.text, self.label), self.header)
        return _rows(table.columns, self.text, [self._label(table, row) for row in range(len(table))])

    def _label(self, table: DataColumns, row: int) -> Any:
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

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, F1 and Matthews correlation of classes; Pearson and Spearman correlation of a regression.

        "f1" is that of the second class. scores: (rows, num_labels); labels: (rows,).
        """
        from sklearn.metrics import f1_score

        if not self.classes:
            return metrics.of_numbers(scores, labels)
        return {**metrics.of_classes(scores, labels), "f1": float(f1_score(labels, scores.argmax(axis=-1)))}


def _rows(table: Any, names: Sequence[str], labels: Iterable[Any]) -> Rows:
    """Rows with the texts of one column of the table, or the pairs of two."""
    texts = [list(table[name]) for name in names]
    return Rows(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)), list(labels))


class CoLA(Glue, name="glue/cola"):
    """Is the sentence grammatical? Matthews correlation."""

    folder, header, text = "CoLA", ("source", "label", "mark", "sentence"), ("sentence",)
    classes, names, hub_text = ("0", "1"), ("unacceptable", "acceptable"), ("sentence",)
    headline, num_labels = "matthews", 2


class SST2(Glue, name="glue/sst2"):
    """Is the sentence positive? Accuracy."""

    folder, text, classes, hub_text = "SST-2", ("sentence",), ("0", "1"), ("sentence",)
    names = ("negative", "positive")
    headline, num_labels = "accuracy", 2


class MRPC(Glue, name="glue/mrpc"):
    """Do the sentences mean the same? Accuracy; F1, which GLUE reports too, is recorded."""

    folder, text, label, classes = "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")
    names, hub_text = ("not_equivalent", "equivalent"), ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class RTE(Glue, name="glue/rte"):
    """Does the first text entail the second? Accuracy."""

    folder, text, classes = "RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class QNLI(Glue, name="glue/qnli"):
    """Does the sentence answer the question? Accuracy. If dev.tsv is split, rows of one question stay together."""

    folder, text, classes = "QNLI", ("question", "sentence"), ("entailment", "not_entailment")
    hub_text, splits_dev = ("question", "sentence"), True
    headline, num_labels = "accuracy", 2


class STSB(Glue, name="glue/stsb"):
    """How similar are the sentences, from 0 to 5? Pearson correlation."""

    folder, text, label, classes = "STS-B", ("sentence1", "sentence2"), "score", ()
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "pearson", 1
