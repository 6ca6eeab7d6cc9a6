"""GLUE (Wang et al., 2019), from a local folder in the layout `glue/CoLA/train.tsv` or from the hub.

Development sets are the evaluation sets, as usual where the test labels are withheld. Needs `--data-dir`, or, without
it, the hub's `nyu-mll/glue`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from basisadapt.errors import InputError
from basisadapt.tasks.task import Rows, TaskData, readable_folder
from basisadapt.tasks.text import TextTask


class Glue(TextTask):
    """One GLUE task. The subclasses below are data.

    folder: the folder under `glue/`; text: the columns of the texts, by name, or by index where there is no header;
    label: likewise; classes: the labels as written in the files, none for a regression.
    """

    folder: ClassVar[str]
    text: ClassVar[tuple[str | int, ...]]
    label: ClassVar[str | int]
    classes: ClassVar[tuple[str, ...]]
    hub_text: ClassVar[tuple[str, ...]]

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless both files are there, or the hub is to be asked."""
        if data_dir is None:
            return
        readable_folder(data_dir)
        for part in ("train", "dev"):
            path = data_dir / "glue" / self.folder / f"{part}.tsv"
            if not path.is_file():
                raise InputError(f"data folder {str(data_dir)!r} has no {path.relative_to(data_dir)}")

    def load(self, data_dir: Path | None) -> TaskData:
        """Train and development rows, the train rows mixed by a fixed seed."""
        if data_dir is None:
            return self._from_hub()
        self.check(data_dir)
        folder = data_dir / "glue" / self.folder
        return TaskData(self._read(folder / "train.tsv").mixed(), self._read(folder / "dev.tsv"))

    def _read(self, path: Path) -> Rows:
        # Quotes are literal in these files; MRPC starts with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        header = {} if isinstance(self.label, int) else {name: i for i, name in enumerate(table.pop(0))}
        place = [column if isinstance(column, int) else header[column] for column in (*self.text, self.label)]
        whole = [row for row in table if len(row) > max(place)]
        columns = [[row[i] for row in whole] for i in place]
        labels = [self._label(value) for value in columns[-1]]
        return Rows(_texts(columns[:-1]), labels)

    def _label(self, value: str) -> Any:
        return self.classes.index(value) if self.classes else float(value)

    def _from_hub(self) -> TaskData:
        from datasets import load_dataset

        subset = type(self).__name__.lower()
        try:
            parts = load_dataset("nyu-mll/glue", subset)
        except Exception as error:  # the hub's client raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"task glue/{subset} needs --data-dir or the hub, which failed: {reason}") from error

        def rows(part: Any) -> Rows:
            return Rows(_texts([list(part[name]) for name in self.hub_text]), list(part["label"]))

        return TaskData(rows(parts["train"]).mixed(), rows(parts["validation"]))

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, F1 and Matthews' correlation of two classes; Pearson and Spearman of a regression."""
        from scipy import stats
        from sklearn.metrics import f1_score, matthews_corrcoef

        if not self.classes:
            predicted = scores.reshape(-1)
            return {
                "pearson": float(stats.pearsonr(predicted, labels).statistic),
                "spearman": float(stats.spearmanr(predicted, labels).statistic),
            }
        chosen = scores.argmax(axis=-1)
        return {
            "accuracy": float(np.mean(chosen == labels)),
            "f1": float(f1_score(labels, chosen)),
            "matthews": float(matthews_corrcoef(labels, chosen)),
        }


def _texts(columns: list[list[str]]) -> list[Any]:
    """One column of texts as it is, two as pairs."""
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


class CoLA(Glue, name="glue/cola"):
    """Is the sentence grammatical? Matthews' correlation."""

    folder, text, label, classes, hub_text = "CoLA", (3,), 1, ("0", "1"), ("sentence",)
    headline, num_labels = "matthews", 2


class SST2(Glue, name="glue/sst2"):
    """Is the sentence positive? Accuracy."""

    folder, text, label, classes, hub_text = "SST-2", ("sentence",), "label", ("0", "1"), ("sentence",)
    headline, num_labels = "accuracy", 2


class MRPC(Glue, name="glue/mrpc"):
    """Do the sentences say the same? Accuracy."""

    folder, text, label, classes = "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class RTE(Glue, name="glue/rte"):
    """Does the first text entail the second? Accuracy."""

    folder, text, label = "RTE", ("sentence1", "sentence2"), "label"
    classes, hub_text = ("entailment", "not_entailment"), ("sentence1", "sentence2")
    headline, num_labels = "accuracy", 2


class QNLI(Glue, name="glue/qnli"):
    """Does the sentence answer the question? Accuracy."""

    folder, text, label = "QNLI", ("question", "sentence"), "label"
    classes, hub_text = ("entailment", "not_entailment"), ("question", "sentence")
    headline, num_labels = "accuracy", 2


class STSB(Glue, name="glue/stsb"):
    """How alike are the sentences, 0 to 5? Pearson's correlation."""

    folder, text, label, classes = "STS-B", ("sentence1", "sentence2"), "score", ()
    hub_text = ("sentence1", "sentence2")
    headline, num_labels = "pearson", 1
