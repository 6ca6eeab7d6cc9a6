"""The record: MLflow, with an experiment per study, a parent run per invocation, a child run per cell."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basisadapt.core.command import tell
from basisadapt.core.errors import one_line
from basisadapt.diagnostics.figures import pictures
from basisadapt.study.outcome import Outcome
from basisadapt.study.record.bulk import has_tables, read_runs, write_points
from basisadapt.study.record.client import open_client
from basisadapt.study.record.content import parameters_of, points_of
from basisadapt.study.record.notes import cell_note, guide
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.runs import (
    ACCUMULATE,
    ALIVE,
    CELL,
    CLAIMED,
    DATA,
    ENVIRONMENT,
    ERROR,
    HEADLINE,
    HOST,
    ROW,
    STATUS,
    TERMINAL,
    UNDRAWN,
    WARNINGS,
    precedence,
    read_run,
    sign,
    signature,
)
from basisadapt.study.record.stores import (
    FILES,
    artifact_folder,
    check_sound,
    file_of,
    move_files,
    sqlite_file,
    storable,
    store_errors,
)
from basisadapt.study.record.texts import METRICS, PARAMETERS, batches, clean, limited, warnings_text, write_into
from basisadapt.training.execution.lines import check_score, is_number

if TYPE_CHECKING:
    from basisadapt.study.plan.cells import Cell
    from basisadapt.study.plan.spec import StudySpec
    from basisadapt.training import RunResult

BEAT, SILENCE = 20.0, 180.0  # seconds between two signs of life, and without one until a driver elsewhere is dead
UNDECIDED, NOTICED = 10.0, 1.0  # seconds that a claim waits for another one to be made, and after which that is said
ADAPTER = "adapter"  # the folder of a run's files that holds its adapter
FEW = 20  # cells whose runs are sooner read one by one than in the whole record
COMPARED = 100  # runs that fit into an address, and onto the page that it leads to


@dataclass(frozen=True)
class Imported:
    """A result from elsewhere: the machine that computed it, and from when to when, in seconds since 1970."""

    cell: Cell
    result: RunResult
    host: str
    began: float
    ended: float


class LostRunError(Exception):
    """A run was closed by another process, which took the one that had it for dead."""


class Record:
    """One study's part of an MLflow store.

    Opening it writes nothing, but makes a missing sqlite file, and finds the files of runs in a folder that was moved.
    metrics: those with a slash in their names that outcomes() is to have, as it has all others.
    """

    def __init__(self, tracking_uri: str, study: str, metrics: Collection[str] = ()) -> None:
        self.tracking_uri = tracking_uri
        self.study = study
        self._metrics = metrics
        self._client, found = open_client(tracking_uri, study)
        self.experiment_id: str | None = found.experiment_id if found else None
        if found is not None:
            self._find_files(found.artifact_location)
        self._seen: dict[str, tuple[str, float]] = {}  # a run's last sign of life, and when it was first seen
        self._texts: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        self._primary = ""  # the metric that the experiment's page shows first, as far as it was set here

    def _find_files(self, location: str) -> None:
        """Have MLflow look beside the database for files that it knows at `location`, where both were moved there.

        Left as they are: files that have another place by someone's wish, and those that stayed where they were.
        """
        path, folder = sqlite_file(self.tracking_uri), artifact_folder(self.tracking_uri)
        mine = f"/{FILES}/{urllib.parse.quote(self.study)}"
        if path is None or folder is None or not location.startswith("file:") or not location.endswith(mine):
            return
        old = location.removesuffix(mine) + f"/{FILES}/"
        if old != (new := f"{folder.as_uri()}/") and (folder.exists() or not file_of(old).exists()):
            with suppress(sqlite3.Error):  # who may only read finds no pictures
                move_files(path, old, new)

    @staticmethod
    def read(tracking_uri: str, study: str, metrics: Collection[str] = ()) -> dict[str, Outcome]:
        """outcomes() without making anything: empty where there is no record yet."""
        path = sqlite_file(tracking_uri)
        if path is not None and not path.exists():
            return {}
        check_sound(tracking_uri, "--tracking-uri")
        return Record(tracking_uri, study, metrics).outcomes()

    def outcomes(self, cells: Collection[Cell] | None = None) -> dict[str, Outcome]:
        """Cell key to what is known of it: its earliest done run, else one that runs, else its latest.

        cells: those that are asked for, at least. The whole record of a long study takes seconds to read.
        """
        few = cells is not None and len(cells) <= FEW
        runs = chain.from_iterable(map(self._runs_of, cells)) if cells is not None and few else self._every_run()
        found = sorted((self._outcome(run) for run in runs if CELL in run.data.tags), key=precedence)
        return {outcome.key: outcome for outcome in reversed(found)}

    def close_orphans(self) -> set[str]:
        """Close as killed what is RUNNING though its process is gone. Returns the ids of the runs that still are."""
        running = set()
        for run in self._runs("attributes.status = 'RUNNING'"):
            if self._outcome(run).orphan:
                self.close(run.info.run_id, "killed")
            else:
                running.add(run.info.run_id)
        return running

    def beat(self, run_ids: Iterable[str]) -> None:
        """Say that the driver of these runs lives."""
        for run_id in run_ids:
            self._client.set_tag(run_id, ALIVE, sign())

    def begin(self, spec: StudySpec, tags: Mapping[str, str]) -> str:
        """Make the experiment if it is new, close orphans, and start the invocation's parent run."""
        if self.experiment_id is None:
            folder = artifact_folder(self.tracking_uri)
            # Absolute, beside the database: the artifacts are found from wherever the next command runs.
            place = (folder / spec.name).as_uri() if folder else None
            self.experiment_id = self._make_experiment(spec.name, place)
        for key, value in {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": guide(spec),
        }.items():
            self._client.set_experiment_tag(self.experiment_id, key, value)
        self.close_orphans()
        name = f"{clean(spec.name)} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        texts = {name: limited(value) for name, value in tags.items()}
        run = self._client.create_run(self.experiment_id, tags={**signature(), **texts}, run_name=name)
        return str(run.info.run_id)

    def _make_experiment(self, name: str, place: str | None) -> str:
        """Its id, also where another driver has made it in the meantime."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def start(
        self, parent: str, cell: Cell, waits: Callable[[], None] = lambda: None, imported: Imported | None = None
    ) -> str | None:
        """Start a cell's child run, with its parameters. None if it is done, or another process is at it.

        waits: is called when another process has to be waited for, which may want the cell too.
        """
        tags = {"mlflow.parentRunId": parent, CELL: cell.key, ROW: limited(cell.row), **signature()}
        began = None
        if imported is not None:
            tags |= {HOST: limited(imported.host), UNDRAWN: "true"}
            began = int(imported.began * 1000)
        name = clean(f"{cell.row} seed {cell.seed}")
        run = self._client.create_run(self.experiment_id, start_time=began, tags=tags, run_name=name)
        run_id = str(run.info.run_id)
        try:
            if not self._claim(run, cell, waits):
                self.close(run_id, "killed")
                self._client.delete_run(run_id)
                return None
            self._describe(run_id, cell)
        except BaseException:
            with suppress(*store_errors()):  # else the next call closes it
                self.close(run_id, "killed")
            raise
        return run_id

    def _describe(self, run_id: str, cell: Cell) -> None:
        """Write a cell's parameters and configuration."""
        from mlflow.entities import Param

        parameters = [Param(name, limited(value)) for name, value in parameters_of(cell).items()]
        for batch in batches(parameters, PARAMETERS):
            self._client.log_batch(run_id, params=batch)
        self._client.log_dict(run_id, cell.config.to_mapping(), "config.json")

    def _claim(self, run: Any, cell: Cell, waits: Callable[[], None] = lambda: None) -> bool:
        """Whether the new run has its cell for itself.

        Several processes may have found the cell free, and have a run each now. One that sees a claim, or an earlier
        run, gives way; one that sees later runs only waits until they have seen it, or are claimed: they may have
        looked before it was there. So one stays, and none waits for one that waits; nor for long, as the other may
        have been suspended: then it gives way too.
        """
        me = (run.info.start_time, run.info.run_id)
        began, said = time.monotonic(), False
        while True:
            others = [(other, self._outcome(other)) for other in self._runs_of(cell) if other.info.run_id != me[1]]
            rivals = [(other, outcome) for other, outcome in others if outcome.done or outcome.busy]
            for other, outcome in rivals:
                if outcome.done or outcome.claimed or (other.info.start_time, other.info.run_id) < me:
                    return False
            if not rivals:
                self._client.set_tag(me[1], CLAIMED, "true")
                return True
            waited = time.monotonic() - began
            if waited > UNDECIDED:
                return False
            if waited > NOTICED and not said:
                said = True
                waits()
            time.sleep(0.05)

    def finish(
        self,
        run_id: str,
        cell: Cell,
        result: RunResult,
        drawn: Mapping[str, bytes],
        imported: Imported | None = None,
        adapter: Path | None = None,
    ) -> None:
        """Write a result whole, then mark the run as done: a kill on the way leaves a cell to run.

        drawn: name to PNG file. adapter: a folder to be kept with the run. Raises InputError for a finished result
        without its headline metric, and LostRunError.
        """
        from mlflow.entities import RunTag

        check_score(result)
        if self._client.get_run(run_id).info.status != "RUNNING":
            raise LostRunError(run_id)
        self._write_points(run_id, [point for point in points_of(result) if is_number(point[1])])
        tags = {
            HEADLINE: clean(result.headline),
            WARNINGS: warnings_text(result.warnings),
            "mlflow.note.content": cell_note(cell, result),
            "mlflow.source.git.commit": result.environment.get("git_commit", "unknown"),
            **{f"{ENVIRONMENT}{name}": value for name, value in result.environment.items()},
            **{f"{DATA}{name}": str(value) for name, value in result.data.items()},
            **({ACCUMULATE: str(result.accumulate)} if result.accumulate > 1 else {}),
        }
        self._client.log_batch(run_id, tags=[RunTag(clean(name), limited(value)) for name, value in tags.items()])
        with tempfile.TemporaryDirectory() as folder:
            whole = json.dumps({"config": cell.config.to_mapping(), **vars(result)})
            for name, content in {"result.json": whole.encode(), **drawn}.items():
                (Path(folder) / name).write_bytes(content)
            self._client.log_artifacts(run_id, folder)
        if adapter is not None:
            self._client.log_artifacts(run_id, str(adapter), ADAPTER)
        if result.headline != self._primary:  # charts and parallel coordinates of the experiment start from it
            primary = {"name": clean(result.headline), "greaterIsBetter": "True"}
            for name, value in primary.items():
                self._client.set_experiment_tag(self.experiment_id, f"mlflow.experiment.primaryMetric.{name}", value)
            self._primary = result.headline
        self.close(run_id, result.status, ended=imported.ended if imported else None)

    def _write_points(self, run_id: str, points: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if has_tables(self.tracking_uri):
            write_points(self.tracking_uri, run_id, points, now)
            return
        for batch in batches([Metric(name, value, now, step) for name, value, step in points], METRICS):
            self._client.log_batch(run_id, metrics=batch)

    def fail(self, run_id: str, error: str, traceback: str = "") -> None:
        """Record a cell that failed."""
        self._client.set_tag(run_id, "mlflow.note.content", limited(f"Failed: {error}"))
        if traceback:
            self._client.log_text(run_id, storable(traceback), "traceback.txt")
        self.close(run_id, "failed", error)

    def end(self, parent: str, note: str, files: Mapping[str, str | bytes]) -> None:
        """Write the files of an invocation's report, and end its parent run."""
        with tempfile.TemporaryDirectory() as folder:
            write_into(Path(folder), files)
            self._client.log_artifacts(parent, folder)
        self._client.set_tag(parent, "mlflow.note.content", limited(note))
        self.close(parent, "finished")

    def close(self, run_id: str, status: str, error: str = "", ended: float | None = None) -> None:
        """Give a run its last status, with the reason of a bad one. ended: in seconds since 1970, None is now."""
        if error:
            self._client.set_tag(run_id, ERROR, limited(error))
        self._client.set_tag(run_id, STATUS, status)
        self._client.set_terminated(run_id, TERMINAL[status], end_time=None if ended is None else int(ended * 1000))

    def cut_off(self, run_id: str, reason: str) -> None:
        """Close a run as killed, unless it has ended already."""
        if self._client.get_run(run_id).info.status == "RUNNING":
            self.close(run_id, "killed", reason)

    def pictures(self, run_id: str) -> dict[str, bytes]:
        """The PNG files of a run, name to content; empty where its files cannot be read any more.

        Those of a run that was imported are drawn when they are asked for, from its result, and kept with it.
        """
        try:
            tags = self._client.get_run(run_id).data.tags
            if UNDRAWN in tags:
                return self._draw(run_id, tags.get(ROW, ""))
            names = sorted(file.path for file in self._client.list_artifacts(run_id))
            return {name: self._file(run_id, name) for name in names if name.endswith(".png")}
        except store_errors():
            return {}

    def undrawn(self, run_ids: Collection[str]) -> list[str]:
        """Those of the runs whose pictures are still to be drawn."""
        return [run.info.run_id for run in self._runs(f"tags.`{UNDRAWN}` = 'true'") if run.info.run_id in run_ids]

    def _draw(self, run_id: str, row: str) -> dict[str, bytes]:
        """Draw a run's pictures, and keep them with it where that can be done; what cannot be drawn has none."""
        result = json.loads(self._file(run_id, "result.json"))
        title = f"{row}, seed {result['config']['seed']}"
        try:
            drawn = pictures(title, result)
        except Exception as error:  # whatever stands in the place of curves and spectra
            tell(f"{title} (run {run_id}) cannot be drawn: {one_line(error)}")
            drawn = {}
        with suppress(*store_errors()), tempfile.TemporaryDirectory() as folder:
            write_into(Path(folder), drawn)
            self._client.log_artifacts(run_id, folder)
            self._client.delete_tag(run_id, UNDRAWN)  # last: after a kill they are drawn again
        return drawn

    def _file(self, run_id: str, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, name, folder)).read_bytes()

    def compare_path(self, run_ids: Sequence[str]) -> str | None:
        """The page of MLflow's UI that compares these runs, from the root of its address; None of too many for one."""
        if len(run_ids) > COMPARED:
            return None
        lists = {"runs": list(run_ids), "experiments": [self.experiment_id]}
        query = {name: json.dumps(ids, separators=(",", ":")) for name, ids in lists.items()}
        return f"/#/compare-runs?{urllib.parse.urlencode(query, safe='[],')}"

    def _every_run(self) -> Iterable[Any]:
        if self.experiment_id is None or not has_tables(self.tracking_uri):
            return self._runs()
        return read_runs(self.tracking_uri, self.experiment_id, self._metrics, HEADLINE)

    def _runs_of(self, cell: Cell) -> Iterable[Any]:
        return self._runs(f"tags.`{CELL}` = '{cell.key}'")

    def _runs(self, where: str = "") -> Iterable[Any]:
        token: str | None = None
        while self.experiment_id is not None:
            page = self._client.search_runs([self.experiment_id], where, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _outcome(self, run: Any) -> Outcome:
        return read_run(run, self._is_gone, self._shared)

    def _shared(self, texts: dict[str, str]) -> Mapping[str, str]:
        """The same mapping for equal ones: of a study's cells most have the same versions and data."""
        return self._texts.setdefault(tuple(texts.items()), texts)

    def _is_gone(self, run: Any, owner: Owner) -> bool:
        """Whether a run's driver is dead: seen to be gone, or elsewhere and silent for SILENCE as seen from here.

        No two clocks are compared: a sign of life is one because it differs from that before.
        """
        if owner.is_here or owner.is_dead:
            return owner.is_dead
        sign, now = run.data.tags.get(ALIVE, ""), time.monotonic()
        seen, since = self._seen.setdefault(run.info.run_id, (sign, now))
        if sign != seen:
            self._seen[run.info.run_id] = sign, now
            return False
        return now - since > SILENCE
