"""The pictures of runs, kept with them in MLflow. Those of an imported run are drawn when they are asked for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from basisadapt.core.command import tell
from basisadapt.core.errors import one_line
from basisadapt.diagnostics.figures import pictures
from basisadapt.study.record.client import RedactingClient
from basisadapt.study.record.runs import ROW, UNDRAWN, Runs
from basisadapt.study.record.stores import file_of, store_errors


class Pictures:
    """The pictures of a study's runs."""

    def __init__(self, client: RedactingClient, runs: Runs) -> None:
        self._client, self._runs = client, runs

    def of(self, run_id: str) -> dict[str, bytes]:
        """The PNG files of a run, name to content; empty if they cannot be read."""
        try:
            run = self._client.get_run(run_id)
            if UNDRAWN in run.data.tags:
                return self._draw(run_id, run.data.tags.get(ROW, ""))
            if run.info.artifact_uri.startswith("file:"):  # MLflow's client asks the database again for every file
                return {file.name: file.read_bytes() for file in sorted(file_of(run.info.artifact_uri).glob("*.png"))}
            names = sorted(file.path for file in self._client.list_artifacts(run_id))
            return {name: self._file(run_id, name) for name in names if name.endswith(".png")}
        except store_errors():
            return {}

    def undrawn(self, run_ids: Collection[str]) -> list[str]:
        """Those of the runs whose pictures are still to be drawn."""
        return [run.info.run_id for run in self._runs.where(f"tags.`{UNDRAWN}` = 'true'") if run.info.run_id in run_ids]

    def _draw(self, run_id: str, row: str) -> dict[str, bytes]:
        """Draw a run's pictures, and keep them with it where that can be done; what cannot be drawn has none."""
        result = json.loads(self._file(run_id, "result.json"))
        title = f"{row}, seed {result['config']['seed']}"
        try:
            drawn = pictures(title, result)
        except Exception as error:  # whatever stands in the place of curves and spectra
            tell(f"{title} (run {run_id}) cannot be drawn: {one_line(error)}")
            drawn = {}
        with suppress(*store_errors()):
            self._client.log_files(run_id, drawn)
            self._client.delete_tag(run_id, UNDRAWN)  # last: after a kill they are drawn again
        return drawn

    def _file(self, run_id: str, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, name, folder)).read_bytes()
