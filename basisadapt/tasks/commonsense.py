"""The eight commonsense tasks and their suites (Hu et al., 2023), from a local folder or from the hub.

The folder is that of LLM-Adapters: `commonsense/boolq/train.json` and `test.json` and so on; next to the tasks' folders
the published mixtures `commonsense_15k.json` and `commonsense_170k.json`, which are rebuilt from the training files if
they are missing; and the user's own mixtures. HellaSwag's folder may have a `subset.json` as its test set.

Without `--data-dir` the original data sets are read from the hub. If their test labels are withheld, the development
sets are the test sets, as published. The published mixture has Winogrande's training rows in all six sizes; from the
hub they are those of the largest, "xl".
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from basisadapt.core.errors import InputError, refusing, unknown
from basisadapt.tasks import commonsense_prompts as prompts
from basisadapt.tasks.choice import ChoiceQuestion, ChoiceTask
from basisadapt.tasks.commonsense_prompts import Asked, Layout
from basisadapt.tasks.hub import rows_from_hub
from basisadapt.tasks.instructions import Instruction, read_instructions, read_json
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import TASKS, Rows, TaskData, readable_folder

CONVERTED = "refs/convert/parquet"  # the hub's own conversion of data sets that consist of scripts
SUBSET = "subset.json"
PREFIX = "commonsense/"


@dataclass(frozen=True)
class Source:
    """The source of a task's rows.

    - `folder` (str): under `commonsense/`.
    - `mixed` (int): the number of its rows in the published mixture of 170,000.
    - `layout`: the form of its instructions.
    - `hub` (str): the original data set on the hub.
    - `convert`: turns a row of the original into question, options and the index of the correct one.
    - `subset`, `revision` (str or None, default None): of the data set on the hub.
    - `test` (str, default "validation"): its split for testing.
    """

    folder: str
    mixed: int
    layout: Layout
    hub: str
    convert: Callable[[Mapping[str, Any]], Asked]
    subset: str | None = None
    revision: str | None = None
    test: str = "validation"


SOURCES = {
    "boolq": Source("boolq", 9_427, prompts.TRUE_FALSE, "google/boolq", prompts.from_boolq),
    "piqa": Source("piqa", 16_113, prompts.SOLUTIONS, "ybisk/piqa", prompts.from_piqa, revision=CONVERTED),
    "social_i_qa": Source(
        "social_i_qa", 33_410, prompts.ANSWERS, "allenai/social_i_qa", prompts.from_social_i_qa, revision=CONVERTED
    ),
    "hellaswag": Source("hellaswag", 39_905, prompts.ENDINGS, "Rowan/hellaswag", prompts.from_hellaswag),
    "winogrande": Source(
        "winogrande",
        63_238,
        prompts.FILLINGS,
        "allenai/winogrande",
        prompts.from_winogrande,
        "winogrande_xl",
        CONVERTED,
    ),
    "arc_easy": Source(
        "ARC-Easy", 2_251, prompts.ANSWERS, "allenai/ai2_arc", prompts.from_arc, "ARC-Easy", test="test"
    ),
    "arc_challenge": Source(
        "ARC-Challenge", 1_119, prompts.ANSWERS, "allenai/ai2_arc", prompts.from_arc, "ARC-Challenge", test="test"
    ),
    "openbookqa": Source(
        "openbookqa", 4_957, prompts.ANSWERS, "allenai/openbookqa", prompts.from_openbookqa, "main", test="test"
    ),
}
ALL_ON_HUB = tuple(dict.fromkeys(source.hub for source in SOURCES.values()))


class CommonsenseTask(ChoiceTask):
    """One of the eight tasks, trained on its own training rows. Its name is PREFIX and a key of SOURCES."""

    source: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class as `Task` does. One with another name has the source of its base."""
        super().__init_subclass__(name=name, **kwargs)
        if name is not None and name.removeprefix(PREFIX) in SOURCES:
            cls.source = name.removeprefix(PREFIX)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless both files exist, or the hub is used (data_dir is None)."""
        if data_dir is None:
            return
        if _test_file(data_dir, self.source) is None:
            raise InputError(f"data folder {str(data_dir)!r} has no {_file(self.source, 'test.json')}")
        if not (data_dir / _file(self.source, "train.json")).is_file():
            raise InputError(
                f"data folder {str(data_dir)!r} has no {_file(self.source, 'train.json')}; commonsense/all trains on "
                f"what the folder has for other tasks and is evaluated on {self.source} as well"
            )

    @property
    def on_hub(self) -> Sequence[str]:
        """The task's data set."""
        return (SOURCES[self.source].hub,)

    def load(self, data_dir: Path | None) -> TaskData:
        """Training and test rows, both shuffled by a fixed seed. Raises InputError naming file and row."""
        self.check(data_dir)
        trained = {self.source: _train_rows(self.source, data_dir)}
        return _data(trained, {self.source: _test_rows(self.source, data_dir)})


class BoolQ(CommonsenseTask, name="commonsense/boolq"):
    """Yes-or-no questions, answered true or false. Source: Clark et al. (2019)."""


class PIQA(CommonsenseTask, name="commonsense/piqa"):
    """Which of two solutions works in the physical world?"""


class SocialIQA(CommonsenseTask, name="commonsense/social_i_qa"):
    """What do people do, want and feel? Three answers."""


class HellaSwag(CommonsenseTask, name="commonsense/hellaswag"):
    """How does the situation continue? Four endings."""


class WinoGrande(CommonsenseTask, name="commonsense/winogrande"):
    """Which of two options fills the blank?"""


class ARCEasy(CommonsenseTask, name="commonsense/arc_easy"):
    """School science, three to five answers."""


class ARCChallenge(CommonsenseTask, name="commonsense/arc_challenge"):
    """School science that retrieval does not answer, three to five answers."""


class OpenBookQA(CommonsenseTask, name="commonsense/openbookqa"):
    """Elementary science, four answers."""


class CommonsenseSuite(ChoiceTask, name="commonsense/all"):
    """Trained on every training file of the folder and tested on every test file; from the hub, on all eight tasks.

    "accuracy" is the unweighted mean over the tasks that the folder has. The test rows alternate between the tasks, so
    the first ones have equal shares.
    """

    on_hub = ALL_ON_HUB

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless there are a training file and a test file, or the hub is used (data_dir is None)."""
        _tested(data_dir)
        if not _trained(data_dir):
            raise InputError(f"data folder {str(data_dir)!r} has no {_file('boolq', 'train.json')} or another task's")

    def load(self, data_dir: Path | None) -> TaskData:
        """The training rows of all tasks, shuffled by a fixed seed, and the test rows, alternating between tasks."""
        self.check(data_dir)
        trained = {source: _train_rows(source, data_dir) for source in _trained(data_dir)}
        return _data(trained, {source: _test_rows(source, data_dir) for source in _tested(data_dir)})


class CommonsenseMixture(ChoiceTask):
    """Trained on a mixture of the tasks' rows, and tested on every test file of the folder, like `commonsense/all`.

    file: the mixture's name, next to the tasks' folders in `--data-dir`; its rows may have any of the layouts.
    """

    file: str

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the mixture and a test file are there."""
        if data_dir is None:
            raise InputError(f"{self.file} needs --data-dir; commonsense/all trains on the original data of the hub")
        if not self.has_file(readable_folder(data_dir)):
            raise InputError(f"data folder {str(data_dir)!r} has no commonsense/{self.file}")
        _tested(data_dir)

    def load(self, data_dir: Path | None) -> TaskData:
        """The mixture, shuffled by a fixed seed, and the test rows, alternating between tasks. Raises InputError."""
        self.check(data_dir)
        assert data_dir is not None
        mixture = {self.file: _rows(data_dir / "commonsense" / self.file, prompts.LAYOUTS, "mixture")}
        return _data(mixture, {source: _test_rows(source, data_dir) for source in _tested(data_dir)})

    def has_file(self, data_dir: Path) -> bool:
        """Whether the data folder has the mixture."""
        return (data_dir / "commonsense" / self.file).is_file()


class OwnMixture(CommonsenseMixture):
    """The task `commonsense/NAME`: the user's own mixture `NAME.json`."""

    def __init__(self, name: str, settings: DataSettings) -> None:
        super().__init__(settings)
        self._name, self.file = name, f"{name.removeprefix(PREFIX)}.json"

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError, with the nearest task, unless the mixture and a test file are there."""
        try:
            super().check(data_dir)
        except InputError as error:
            if data_dir is not None and self.has_file(data_dir):
                raise
            raise InputError(f"{unknown('task', self._name, TASKS)}; {error}") from error


class PublishedMixture(CommonsenseMixture):
    """A published training mixture, which is rebuilt from the eight training files if its own file is missing.

    rows (int or None): how many rows to draw then, in the published proportions; None takes all.
    """

    rows: ClassVar[int | None]
    on_hub = ALL_ON_HUB

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless the mixture or all training files exist, and a test file; the hub has all tasks."""
        if data_dir is None:
            return None
        if self.has_file(readable_folder(data_dir)):
            return super().check(data_dir)
        missing = [str(_file(source, "train.json")) for source in SOURCES if source not in _trained(data_dir)]
        if missing:
            raise InputError(
                f"data folder {str(data_dir)!r} has no commonsense/{self.file}, nor {', '.join(missing)} to rebuild it"
            )
        _tested(data_dir)

    def load(self, data_dir: Path | None) -> TaskData:
        """The published mixture, or the rebuilt one; the recorded `split` then says so. Raises InputError."""
        self.check(data_dir)
        if data_dir is not None and self.has_file(data_dir):
            return super().load(data_dir)
        trained, how = {source: _train_rows(source, data_dir) for source in SOURCES}, "all rows of the training files"
        if self.rows is not None:
            trained, how = _drawn(trained, self.rows), "rows of the training files in the published proportions"
        tested = {source: _test_rows(source, data_dir) for source in _tested(data_dir)}
        return _data(trained, tested, f"rebuilt without {self.file}, from {how}: ")


class Commonsense15k(PublishedMixture, name="commonsense/15k"):
    """The regime of 15,000 rows."""

    file, rows = "commonsense_15k.json", 15_000


class Commonsense170k(PublishedMixture, name="commonsense/170k"):
    """The regime of 170,000 rows."""

    file, rows = "commonsense_170k.json", None


def _drawn(trained: Mapping[str, Rows], count: int) -> dict[str, Rows]:
    """`count` rows in the proportions of the published mixture, rounded by largest remainders.

    Each task's rows are drawn with a seed of its own, so they do not depend on the other tasks. Raises InputError if a
    task has too few.
    """
    published = sum(place.mixed for place in SOURCES.values())
    shares = {source: count * place.mixed / published for source, place in SOURCES.items()}
    counts = {source: int(share) for source, share in shares.items()}
    by_remainder = sorted(SOURCES, key=lambda source: counts[source] - shares[source])
    for source in by_remainder[: count - sum(counts.values())]:
        counts[source] += 1
    for source, rows in trained.items():
        if counts[source] > len(rows):
            raise InputError(
                f"{_file(source, 'train.json')} has {len(rows):,} rows, and {counts[source]:,} of them belong to "
                f"{count:,} in the published proportions"
            )
    return {
        source: rows.take(random.Random(f"{source} {count}").sample(range(len(rows)), counts[source]))
        for source, rows in trained.items()
    }


# --- files ---


def _file(source: str, name: str) -> Path:
    return Path("commonsense") / SOURCES[source].folder / name


def _test_file(data_dir: Path, source: str) -> Path | None:
    """A task's test file, or None. Raises InputError if the folder cannot be read."""
    names = ("test.json", SUBSET) if source == "hellaswag" else ("test.json",)
    paths = [readable_folder(data_dir) / _file(source, name) for name in names]
    return next((path for path in paths if path.is_file()), None)


def _trained(data_dir: Path | None) -> list[str]:
    """The tasks that can be trained on."""
    return [source for source in SOURCES if data_dir is None or (data_dir / _file(source, "train.json")).is_file()]


def _tested(data_dir: Path | None) -> list[str]:
    """The tasks that can be tested on. Raises InputError if there are none."""
    tested = [source for source in SOURCES if data_dir is None or _test_file(data_dir, source)]
    if not tested:
        raise InputError(f"data folder {str(data_dir)!r} has no {_file('boolq', 'test.json')} or another task's")
    return tested


def _train_rows(source: str, data_dir: Path | None) -> Rows:
    if data_dir is None:
        return _from_hub(source, "train")
    return _rows(data_dir / _file(source, "train.json"), [SOURCES[source].layout], source)


def _test_rows(source: str, data_dir: Path | None) -> Rows:
    if data_dir is None:
        return _from_hub(source, SOURCES[source].test)
    path = _test_file(data_dir, source)
    assert path is not None
    if path.name == SUBSET:
        return _subset_rows(path)
    return _rows(path, [SOURCES[source].layout], source)


def _rows(path: Path, layouts: Sequence[Layout], group: str) -> Rows:
    """The rows of an instruction file, each in one of the layouts."""
    pairs = []
    for number, row in enumerate(read_instructions(path), start=1):
        with refusing(f"data file {str(path)!r}, row {number}", InputError):
            pairs.append(_question(row, layouts, group))
    return _of_pairs(pairs)


def _question(row: Instruction, layouts: Sequence[Layout], group: str) -> tuple[ChoiceQuestion, str]:
    layout = next((layout for layout in layouts if layout.opens(row.instruction)), layouts[0])
    question = layout.question(row.instruction, group)
    right = {option.response: option.name for option in question.options}
    if row.output not in right:
        raise InputError(f"output must be one of {', '.join(map(repr, right))}, got {row.output!r:.80}")
    if row.answer not in ("", right[row.output]):
        raise InputError(f"answer {row.answer!r:.80} is not that of the output, {row.output!r}")
    return question, row.output


def _subset_rows(path: Path) -> Rows:
    """The test rows of a HellaSwag subset: {"test": [{"question", "choices": {"A": ...}, "answer": "A"}, ...]}."""
    content = read_json(path)
    rows = content.get("test") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"data file {str(path)!r} must hold a list of rows called 'test', at least one")
    return _converted(rows, prompts.from_subset, "hellaswag", f"data file {str(path)!r}, test")


def _converted(
    rows: Iterable[Mapping[str, Any]], convert: Callable[[Mapping[str, Any]], Asked], source: str, where: str
) -> Rows:
    """Rows of another data set, in the published layout. Raises InputError naming the row."""
    layout, questions, responses = SOURCES[source].layout, [], []
    for number, row in enumerate(rows, start=1):
        try:
            text, options, right = convert(row)
            question = layout.question(layout.render(text, options), source)
            question.prompt.encode()  # JSON can spell half of a surrogate pair
            if not 0 <= right < len(question.options):
                raise InputError(f"there is no option {right + 1}")
            responses.append(question.options[right].response)
        except InputError as error:
            raise InputError(f"{where}, row {number}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}, row {number} is not laid out as expected: {error!r}") from error
        questions.append(question)
    return Rows(questions, responses)


def _from_hub(source: str, split: str) -> Rows:
    place = SOURCES[source]
    rows = rows_from_hub(source, place.hub, place.subset, place.revision)[split]
    return _converted(rows, place.convert, source, f"{place.hub}, {split}")


# --- what a task hands over ---


def _data(trained: Mapping[str, Rows], tested: Mapping[str, Rows], before: str = "") -> TaskData:
    """Training rows, shuffled together; test rows, shuffled per task, then taken from the tasks in turn.

    before: the beginning of the description of the split.
    """
    pairs = [[*zip(rows.inputs, rows.labels, strict=True)] for rows in map(Rows.mixed, tested.values())]
    train = _of_pairs(pair for rows in trained.values() for pair in zip(rows.inputs, rows.labels, strict=True)).mixed()
    test = _of_pairs(pair for turn in itertools.zip_longest(*pairs) for pair in turn if pair is not None)
    split = f"{before}trained on {_sizes(trained)}; tested on {_sizes(tested)}"
    return TaskData(train, test, mark=_mark(train, test), about={"split": split})


def _sizes(parts: Mapping[str, Rows]) -> str:
    return ", ".join(f"{name} ({len(rows)})" for name, rows in parts.items())


def _of_pairs(pairs: Iterable[tuple[ChoiceQuestion, str]]) -> Rows:
    questions, responses = zip(*pairs, strict=True)
    return Rows(list(questions), list(responses))


def _mark(*parts: Rows) -> str:
    """A hash of every prompt and response."""
    digest = hashlib.sha256()
    for rows in parts:
        for question, response in zip(rows.inputs, rows.labels, strict=True):
            digest.update(f"{question.prompt}\0{response}\0".encode())
    return digest.hexdigest()
