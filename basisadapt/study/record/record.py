"""The record: MLflow, with an experiment per study, a parent run per invocation, a child run per cell."""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from basisadapt.core.markup import in_markdown
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.record.bulk import has_tables, write_points
from basisadapt.study.record.client import open_client
from basisadapt.study.record.content import parameters_of, points_of, tags_of
from basisadapt.study.record.notes import cell_note, guide
from basisadapt.study.record.pictures import Pictures
from basisadapt.study.record.runs import (
    ALIVE,
    CELL,
    CLAIMED,
    ERROR,
    HOST,
    ROW,
    STATUS,
    TERMINAL,
    UNDRAWN,
    Runs,
    precedence,
    sign,
    signature,
)
from basisadapt.study.record.stores import artifact_folder, check_sound, follow_files, sqlite_file, store_errors
from basisadapt.study.record.texts import METRICS, PARAMETERS, batches, clean, limited
from basisadapt.training import RunResult
from basisadapt.training.execution.json_lines import check_score, is_number

UNDECIDED, NOTICED = 10.0, 1.0  # seconds that a claim waits for a rival, and until the wait is reported
ADAPTER = "adapter"  # the folder with the adapter, among the files of a run
MAX_SINGLE_READS = 20  # cells whose runs are read one by one, which is faster than the whole record
MAX_COMPARED = 100  # runs that fit into the URL of a page that compares them


@dataclass(frozen=True)
class Imported:
    """A result from elsewhere.

    cell: its cell.
    result: the result.
    host: the host that computed it.
    began, ended: in seconds since 1970.
    """

    cell: Cell
    result: RunResult
    host: str
    began: float
    ended: float


class LostRunError(Exception):
    """Another process has closed a run, since its driver seemed dead."""


class Record:
    """The part of an MLflow store that belongs to one study.

    tracking_uri: the URI of the store.
    study: the name of the study, and of its experiment.
    metrics: names with a slash that outcomes() includes; it includes all without. Default none.

    runs: the runs of the study; pictures: their pictures. Opening it creates a missing sqlite file, and updates the
    paths of files in a folder that was moved. Raises InputError if the store cannot be opened.
    """

    def __init__(self, tracking_uri: str, study: str, metrics: Collection[str] = ()) -> None:
        self.tracking_uri = tracking_uri
        self._client, found = open_client(tracking_uri, study)
        if found is not None:
            follow_files(tracking_uri, study, found.artifact_location)
        self.runs = Runs(self._client, tracking_uri, found.experiment_id if found else None, metrics)
        self.pictures = Pictures(self._client, self.runs)
        self._primary = ""  # the primary metric of the experiment, if it was set here

    @property
    def experiment_id(self) -> str | None:
        """The id of the study's experiment; None before the first begin()."""
        return self.runs.experiment_id

    @staticmethod
    def read(tracking_uri: str, study: str, metrics: Collection[str] = ()) -> dict[str, Outcome]:
        """outcomes() without creating anything; empty if there is no record yet. Raises InputError."""
        path = sqlite_file(tracking_uri)
        if path is not None and not path.exists():
            return {}
        check_sound(tracking_uri, "--tracking-uri")
        return Record(tracking_uri, study, metrics).outcomes()

    def outcomes(self, cells: Collection[Cell] | None = None) -> dict[str, Outcome]:
        """Cell key to its outcome: from its earliest done run, else an open one, else its latest.

        cells: the cells to include, at least. Default None, all; a long study takes seconds to read.
        """
        few = cells is not None and len(cells) <= MAX_SINGLE_READS
        runs = chain.from_iterable(map(self.runs.of, cells)) if cells is not None and few else self.runs.every()
        found = sorted((self.runs.outcome(run) for run in runs if CELL in run.data.tags), key=precedence)
        return {outcome.key: outcome for outcome in reversed(found)}

    def close_orphans(self) -> set[str]:
        """Close the open runs of dead processes as killed. Returns the ids of the runs that stay open."""
        running = set()
        for run in self.runs.where("attributes.status = 'RUNNING'"):
            if self.runs.outcome(run).orphan:
                self.close(run.info.run_id, "killed")
            else:
                running.add(run.info.run_id)
        return running

    def beat(self, run_ids: Iterable[str]) -> None:
        """Record a heartbeat of the driver of these runs."""
        for run_id in run_ids:
            self._client.set_tag(run_id, ALIVE, sign())

    def begin(self, spec: StudySpec, tags: Mapping[str, str]) -> str:
        """Create a missing experiment, close orphans, and start the invocation's parent run. Returns its id."""
        if self.experiment_id is None:
            folder = artifact_folder(self.tracking_uri)
            # Absolute, so that the next command finds the artifacts from any folder.
            place = (folder / spec.name).as_uri() if folder else None
            self.runs.experiment_id = self._make_experiment(spec.name, place)
        self._client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
        self._client.set_experiment_tag(self.experiment_id, "mlflow.note.content", guide(spec))
        self.close_orphans()
        name = f"{clean(spec.name)} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        texts = {name: limited(value) for name, value in tags.items()}
        run = self._client.create_run(self.experiment_id, tags={**signature(), **texts}, run_name=name)
        return str(run.info.run_id)

    def _make_experiment(self, name: str, place: str | None) -> str:
        """The id of the new experiment, or of the one that another driver has just created."""
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
        """Start a cell's child run. Returns its id; None if the cell is done, or another process runs it.

        waits: called if the claim has to wait for another process. Default: do nothing.
        imported: the result, if the cell was run elsewhere. Default None.
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
            with suppress(*store_errors()):  # otherwise the next call closes it
                self.close(run_id, "killed")
            raise
        return run_id

    def _describe(self, run_id: str, cell: Cell) -> None:
        """Write the parameters and the configuration of a cell."""
        from mlflow.entities import Param

        parameters = [Param(name, limited(value)) for name, value in parameters_of(cell).items()]
        for batch in batches(parameters, PARAMETERS):
            self._client.log_batch(run_id, params=batch)
        self._client.log_dict(run_id, cell.config.to_mapping(), "config.json")

    def _claim(self, run: Any, cell: Cell, waits: Callable[[], None] = lambda: None) -> bool:
        """Claim the cell for the new run. Returns whether that succeeds.

        Several processes may have found the cell free and started a run each. A run yields to a claimed or earlier one.
        If it sees only later ones, which may not have seen it, it waits until they have yielded or are claimed. So one
        run stays, and no run waits for one that waits. The other process may be suspended, so the run also yields after
        UNDECIDED seconds.
        """
        me = (run.info.start_time, run.info.run_id)
        began, said = time.monotonic(), False
        while True:
            others = [other for other in self.runs.of(cell) if other.info.run_id != me[1]]
            rivals = [(other, seen) for other in others if (seen := self.runs.outcome(other)).done or seen.busy]
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
        """Write the whole result, then mark the run as done: after a kill in between, the cell runs again.

        drawn: file name to PNG.
        imported: the result, if the cell was run elsewhere. Default None.
        adapter: a folder to keep with the run. Default None.

        Raises InputError for a finished result without its headline metric, and LostRunError if the run is closed.
        """
        from mlflow.entities import RunTag

        check_score(result)
        if self._client.get_run(run_id).info.status != "RUNNING":
            raise LostRunError(run_id)
        self._write_points(run_id, [point for point in points_of(result) if is_number(point[1])])
        tags = {**tags_of(result), "mlflow.note.content": limited(cell_note(cell, result))}
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        whole = json.dumps({"config": cell.config.to_mapping(), **vars(result)})
        self._client.log_files(run_id, {"result.json": whole.encode(), **drawn})
        if adapter is not None:
            self._client.log_artifacts(run_id, str(adapter), ADAPTER)
        if result.headline != self._primary:  # the default of the experiment's charts
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
        """Close the run of a failed cell, with the reason."""
        self._client.set_tag(run_id, "mlflow.note.content", limited(f"Failed: {in_markdown(error)}"))
        if traceback:
            self._client.log_files(run_id, {"traceback.txt": traceback})
        self.close(run_id, "failed", error)

    def end(self, parent: str, note: str, files: Mapping[str, str | bytes]) -> None:
        """Write the files of an invocation's report, and close its parent run as finished."""
        self._client.log_files(parent, files)
        self._client.set_tag(parent, "mlflow.note.content", limited(note))
        self.close(parent, "finished")

    def close(self, run_id: str, status: str, error: str = "", ended: float | None = None) -> None:
        """Close a run with its final status. error: the reason, or "". ended: in seconds since 1970, None is now."""
        if error:
            self._client.set_tag(run_id, ERROR, limited(error))
        self._client.set_tag(run_id, STATUS, status)
        self._client.set_terminated(run_id, TERMINAL[status], end_time=None if ended is None else int(ended * 1000))

    def cut_off(self, run_id: str, reason: str) -> None:
        """Close a run as killed, unless it is closed."""
        if self._client.get_run(run_id).info.status == "RUNNING":
            self.close(run_id, "killed", reason)

    def compare_path(self, run_ids: Sequence[str]) -> str | None:
        """The path of the page in MLflow's UI that compares these runs; None for more than MAX_COMPARED."""
        if len(run_ids) > MAX_COMPARED:
            return None
        lists = {"runs": list(run_ids), "experiments": [self.experiment_id]}
        query = {name: json.dumps(ids, separators=(",", ":")) for name, ids in lists.items()}
        return f"/#/compare-runs?{urllib.parse.urlencode(query, safe='[],')}"
