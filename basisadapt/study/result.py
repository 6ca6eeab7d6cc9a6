"""Studies from Python: `run` and `read_report`, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basisadapt.core.registry import load_plugin
from basisadapt.study.drive import engine
from basisadapt.study.drive.adapters import place_for_adapters
from basisadapt.study.drive.callback import Callback
from basisadapt.study.drive.paths import StudyPaths
from basisadapt.study.plan.spec import read_spec
from basisadapt.study.plan.tuning import Tuning, resolve_tuning
from basisadapt.study.report.figures import comparison_figure
from basisadapt.study.report.records import cell_records, row_records
from basisadapt.study.report.text import to_markdown, to_text
from basisadapt.tasks.task import readable_folder
from basisadapt.training.execution.compute import Inline
from basisadapt.training.execution.executor import JobSettings
from basisadapt.training.execution.workers import local_executor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from basisadapt.study.report.report import Report
    from basisadapt.study.report.verdicts import Verdict


@dataclass(frozen=True)
class Result:
    """What is recorded of a study; a notebook shows it as the report's tables, and print() as the command line does.

    report: the tables with everything behind them.
    """

    report: Report

    @property
    def claims(self) -> tuple[Verdict, ...]:
        """The study's claims, each with its verdict: `claim.text`, `word`, and the numbers in `because`."""
        return self.report.verdicts

    @property
    def figure(self) -> Figure:
        """Every row's seeds, mean and standard deviation; drawn anew each time."""
        return comparison_figure(self.report.table)

    @property
    def is_sound(self) -> bool:
        """Whether no cell has failed or diverged."""
        return not self.report.has_failures

    def to_dataframe(self) -> pd.DataFrame:
        """The study's table, unrounded: a line a row, with its values on the axes before the numbers of `table.csv`."""
        import pandas as pd

        table = self.report.table
        records = zip(table.lines, row_records(table), strict=False)  # without the rows at values of the tuned setting
        return pd.DataFrame([{**dict(line.row.point), **record} for line, record in records])

    def cells(self) -> pd.DataFrame:
        """The cells of the table: a line each, with its values on the axes, its state and every recorded metric."""
        import pandas as pd

        return pd.DataFrame(cell_records(self.report.table))

    def __str__(self) -> str:
        return to_text(self.report)

    def _repr_markdown_(self) -> str:
        return to_markdown(self.report)


def run(
    name: str,
    *,
    preset: str = "quick",
    changes: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    plugins: Sequence[str] = (),
    workers: int | None = None,
    place: StudyPaths | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Run the cells of a study that the record lacks, as `python -m basisadapt.study NAME` does, and report.

    name: of a shipped study, or the path of a YAML file. preset: a name that `--preset` takes, as far as the study
    has it. changes: what `--set` takes, such as "adapter.r=8" or "sweep.basis=sinc,fourier". seeds: instead of the
    study's. plugins: files or modules with bases, tasks and so on of your own. workers: cells that run at once, each in
    its own process; None runs them one by one in this one, which alone knows what a notebook has defined.
    place: where results and inputs lie, by default as on the command line. callbacks: are told how each cell ends.
    A cell that fails or diverges is part of the result, see `Result.is_sound`. Raises InputError before anything is
    run, RecordError where nothing can be recorded any more, and KeyboardInterrupt; what is finished then is kept.
    """
    tuning, place = _resolve(name, preset, changes, seeds, plugins), place or StudyPaths()
    if place.data_dir is not None:
        readable_folder(place.data_dir)
    tags = {"basisadapt.command": f"study.run({name!r}, preset={preset!r})", "basisadapt.preset": preset}
    with place_for_adapters(place.save_adapters) as adapters:
        settings = JobSettings(data_dir=place.data_dir, plugins=tuple(plugins), adapters=adapters)
        executor = Inline(settings) if workers is None else local_executor(workers, settings)
        return Result(engine.run_study(tuning, place, tags, executor, callbacks))


def read_report(
    name: str,
    *,
    preset: str = "quick",
    changes: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    plugins: Sequence[str] = (),
    place: StudyPaths | None = None,
) -> Result:
    """What is recorded of a study, as `python -m basisadapt.study --report NAME` prints it; runs nothing.

    The settings are those of `run`. Raises InputError, also where nothing of the study is recorded.
    """
    return Result(engine.read_report(_resolve(name, preset, changes, seeds, plugins), place or StudyPaths()))


def _resolve(
    name: str, preset: str, changes: Sequence[str], seeds: Sequence[int] | None, plugins: Sequence[str]
) -> Tuning:
    spec = read_spec(name)
    for plugin in plugins:
        load_plugin(plugin)
    return resolve_tuning(spec, preset=preset, changes=changes, seeds=seeds)
