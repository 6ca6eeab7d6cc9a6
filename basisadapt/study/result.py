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
from basisadapt.study.plan.reading import read_spec
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
    """The recorded results of a study. print() writes the report as the command line does; a notebook shows its tables.

    report: the table, the verdicts, and what tuning found.
    """

    report: Report

    @property
    def claims(self) -> tuple[Verdict, ...]:
        """The verdict on each claim of the study: `claim.text`, `word`, and the numbers in `because`."""
        return self.report.verdicts

    @property
    def figure(self) -> Figure:
        """The seeds, mean and standard deviation of every row; a new figure at each access."""
        return comparison_figure(self.report.table)

    @property
    def is_sound(self) -> bool:
        """Whether no cell has failed or diverged."""
        return not self.report.has_failures

    def to_dataframe(self) -> pd.DataFrame:
        """The study's table: for each row, its values on the axes and the columns of `table.csv`, not rounded."""
        import pandas as pd

        table = self.report.table
        records = zip(table.lines, row_records(table), strict=False)  # more follow, at values of the tuned setting
        return pd.DataFrame([{**dict(line.row.point), **record} for line, record in records])

    def cells(self) -> pd.DataFrame:
        """The cells of the table: of each, its values on the axes, its state, its run_id and every recorded metric."""
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
    """Run the missing cells of a study, as `python -m basisadapt.study NAME` does, and report.

    name: a shipped study, or the path of a YAML file.
    preset: "smoke", "quick", "gpu", "llm", "encoder" or "paper", if the study has it. Default "quick".
    changes: arguments of `--set`, such as "adapter.r=8" or "sweep.basis=sinc,fourier". Default none.
    seeds: whole numbers of at least 0 that replace the study's. Default None, the study's.
    plugins: files or modules with your own bases, tasks and so on. Default none.
    workers: the number of cells that run at once, each in its own process. None runs them one by one in this process,
        the only one that knows what a notebook defines. Default None.
    place: where results and inputs are. Default None, the defaults of the command line.
    callbacks: called as each cell ends. Default none.

    The result includes failed and diverged cells, see `Result.is_sound`. Raises InputError before any cell runs,
    RecordError if a store fails, and KeyboardInterrupt. Finished cells stay recorded.
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
    """The recorded results of a study, as `python -m basisadapt.study --report NAME` prints them; runs nothing.

    The settings are those of `run`. Raises InputError, also if nothing of the study is recorded.
    """
    return Result(engine.read_report(_resolve(name, preset, changes, seeds, plugins), place or StudyPaths()))


def _resolve(
    name: str, preset: str, changes: Sequence[str], seeds: Sequence[int] | None, plugins: Sequence[str]
) -> Tuning:
    spec = read_spec(name)
    for plugin in plugins:
        load_plugin(plugin)
    return resolve_tuning(spec, preset=preset, changes=changes, seeds=seeds)
