"""The executor that runs jobs as tasks on a Ray cluster."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import zlib
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basisadapt.core.errors import InputError, one_line
from basisadapt.core.registry import load_plugin
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.compute import compute
from basisadapt.training.execution.executor import Died, Ended, Executor, Job, JobSettings, OnStep
from basisadapt.training.execution.json_lines import end_from_mapping, end_to_mapping

LOCAL = "local"
RETRIES = 3  # of a job whose node or process is lost
NODE = "ray_node"  # in a result's environment: the node that ran it


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Where the cluster is, and what a job takes of it.

    - `address` (str): that of ray.init, or "local" for a cluster on this machine that ends with the executor.
    - `cpus` (float > 0, default 1): CPUs of a job.
    - `gpus` (float >= 0, default 0): GPUs of a job; several jobs share one if it is a fraction.

    Raises InputError for a value out of range.
    """

    address: str
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.cpus > 0:
            raise InputError(f"--cpus-per-cell must be above 0, got {self.cpus:g}")
        if not self.gpus >= 0:
            raise InputError(f"--gpus-per-cell must be at least 0, got {self.gpus:g}")


class RayExecutor(Executor):
    """Runs as many jobs at once as the cluster has capacity for. The nodes keep no results.

    A job whose node is lost runs again on another, up to RETRIES times. Plug-in files are sent with the jobs; modules
    and the tasks' data must be on the nodes.
    """

    here = False

    def __init__(self, cluster: RaySettings, settings: JobSettings) -> None:
        if settings.timeout is not None:
            raise InputError("--timeout does not go with --ray, whose jobs may wait for a node")
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray needs Ray: pip install 'basisadapt[ray]'") from error
        self._ray, self._cluster, self._settings = ray, cluster, settings
        self._plugins = [_packed(plugin) for plugin in settings.plugins]
        self._jobs: dict[Any, str] = {}  # a task's reference to the key of its job
        self._task: Any = None
        self._connection = ExitStack()  # closed when the executor stops

    def prepare(self, parameters: int) -> None:
        """Connect to the cluster. Raises InputError if it cannot be reached."""
        self._connect()

    @property
    def slots(self) -> int:
        """The number of jobs that fit on the nodes that the cluster has now, at least 1."""
        self._connect()
        total = self._ray.cluster_resources()
        fitting = [total.get("CPU", 0) // self._cluster.cpus]
        if self._cluster.gpus:
            fitting.append(total.get("GPU", 0) // self._cluster.gpus)
        return max(1, int(min(fitting)))

    def submit(self, job: Job) -> None:
        """Submit the job to Ray, which chooses a node."""
        self._connect()
        settings = replace(self._settings, plugins=())
        self._jobs[self._task.remote(job.key, job.config.to_mapping(), settings, self._plugins)] = job.key

    def wait(self, on_step: OnStep) -> Ended | Died:
        """Wait until a task ends. `on_step` is never called: a node reports no steps."""
        while True:
            done, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=1.0)  # a Ctrl-C gets in between
            if done:
                return self._end(done[0])

    def stop(self) -> None:
        """Cancel all tasks, and disconnect."""
        for task in self._jobs:
            with suppress(Exception):  # a cluster that is gone runs nothing
                self._ray.cancel(task, force=True)
        self._jobs.clear()
        self._connection.close()
        self._task = None

    def _connect(self) -> None:
        if self._task is not None:
            return
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        try:
            if self._cluster.address == LOCAL:
                self._ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            else:
                self._ray.init(self._cluster.address, **quiet)
        except Exception as error:  # a connection's, a version's or Ray's own
            raise InputError(f"--ray {self._cluster.address!r} cannot be reached: {one_line(error)[:200]}") from error
        self._connection.callback(self._ray.shutdown)
        self._connection.enter_context(redirect_stdout(sys.stderr))  # Ray tells of lost processes on stdout
        needs = {"num_cpus": self._cluster.cpus, "num_gpus": self._cluster.gpus}
        # Without a limit a process that uses a GPU would be left after one job, and the next would import all anew.
        self._task = self._ray.remote(**needs, max_retries=RETRIES, max_calls=0)(run_job)

    def _end(self, task: Any) -> Ended | Died:
        key = self._jobs.pop(task)
        try:
            told = json.loads(zlib.decompress(self._ray.get(task)))
        except self._ray.exceptions.RayTaskError as error:  # raised in the task, before or after the run
            return Ended(key, error=one_line(error.cause), traceback=str(error))
        except self._ray.exceptions.RayError as error:
            return Died(key, f"Ray lost it {RETRIES + 1} times ({type(error).__name__})")
        return end_from_mapping(key, told)


def run_job(key: str, config: dict[str, Any], settings: JobSettings, plugins: list[tuple[str, str | None]]) -> bytes:
    """Run a job on a node. Returns how it ended, as compressed JSON, small enough for Ray not to store it."""
    import ray

    _load_plugins(tuple(plugins))
    data_dir = settings.data_dir
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {str(data_dir)!r} is not on node {ray.util.get_node_ip_address()}")
    ended = compute(Job(key, RunConfig.from_mapping(config)), settings, lambda *_: None)
    if ended.result is not None:
        seen = {**ended.result.environment, NODE: ray.get_runtime_context().get_node_id()}
        ended = replace(ended, result=replace(ended.result, environment=seen))
    return zlib.compress(json.dumps(end_to_mapping(ended)).encode())


@functools.cache
def _load_plugins(plugins: tuple[tuple[str, str | None], ...]) -> None:
    """Load plug-ins in the form of `_packed`, once per process: Ray keeps it for further jobs of the driver."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, source) in enumerate(plugins):
            path = Path(folder, str(number), name)  # two files may have one name
            if source is not None:
                path.parent.mkdir()
                path.write_text(source, encoding="utf-8")
            load_plugin(name if source is None else str(path))


def _packed(plugin: str) -> tuple[str, str | None]:
    """A plug-in as it is sent: the name and source of a file, or the name of a module."""
    path = Path(plugin)
    return (path.name, path.read_text(encoding="utf-8")) if plugin.endswith(".py") else (plugin, None)
