"""Cells in worker processes, what may happen to them there, and how a study is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from common import add, eventually, statuses, table_of
from forked import Forked

from basisadapt.training.execution import machine, scratch, workers
from basisadapt.training.execution.compute import Inline
from basisadapt.training.execution.executor import JobSettings

SEED = ("tiny.yaml", "--seeds", "1")
KILLED = """
import os
from basisadapt.training.execution.scratch import Scratch

made = Scratch()
(made.path / "file").touch()
os._exit(9)  # as after a kill: nothing is cleaned up
"""
STUDY = [sys.executable, "-m", "basisadapt.study", "tiny.yaml"]


def workers_of(driver):
    """What else runs in the folder of a driver; a driver is no parent of its workers where they are `Forked`."""
    others = [process for process in psutil.process_iter() if process.pid not in (driver.pid, os.getpid())]
    return [process for process in others if folder_of(process) == Path.cwd()]


def folder_of(process):
    with suppress(psutil.Error):
        return Path(process.cwd())


def test_the_table_of_two_workers_is_that_of_none(home, fake, faking, study, runs, trials, tmp_path_factory):
    code, out, err = study("tiny.yaml", "--workers", "2", *faking())
    assert code == 0
    assert fake.ran == []
    assert "[9/9] " in err
    assert statuses(runs()) == ["finished"] * 9
    assert sorted(trial.state.name for trial in trials()) == ["COMPLETE"] * 9
    elsewhere = tmp_path_factory.mktemp("inline")
    _, expected, _ = study("tiny.yaml", "--tracking-uri", f"sqlite:///{elsewhere}/mlflow.db")
    assert table_of(out) == table_of(expected)


def test_a_search_with_workers_is_the_search_without(home, faking, study, tmp_path_factory):
    add(home, "search: {adapter.r: [2, 64], basis: [sinc, bspline]}\n")
    search = ("tiny.yaml", "--search", "tpe", "--trials", "3", "--seeds", "1,2", *faking())
    code, out, err = study(*search, "--workers", "2")
    assert code == 0
    assert "trial 3 of 3: 0." in err
    elsewhere = tmp_path_factory.mktemp("inline")
    _, expected, _ = study(*search, "--tracking-uri", f"sqlite:///{elsewhere}/mlflow.db")
    assert table_of(out) == table_of(expected)


def test_a_cell_whose_worker_dies_is_tried_once_more_then_left(home, faking, study, runs, trials):
    ways = {("sinc", 1): "SIGKILL once", ("fourier", 1): "SIGKILL"}
    code, out, err = study(*SEED, "--workers", "1", *faking(ways))
    assert code == 1
    reason = "its process was killed (SIGKILL, as the system does where memory runs out)"
    assert f"sinc, seed 1: {reason}; retrying once" in err
    assert f"Failed: fourier seed 1 ({reason}, twice)." in out
    assert [(run.data.params["row"], run.data.tags["status"]) for run in runs()] == [
        ("LoRA", "finished"), ("sinc", "killed"), ("fourier", "killed"), ("sinc", "finished"), ("fourier", "failed"),
    ]  # fmt: skip
    assert runs()[1].data.tags["basisadapt.error"] == reason
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "FAIL"]


def test_a_cell_that_takes_too_long_fails_and_the_others_go_on(home, faking, study, runs):
    code, out, _ = study(*SEED, "--timeout", "4", *faking({("fourier", 1): "hang"}))
    assert code == 1
    assert "Failed: fourier seed 1 (took longer than the 4 s of --timeout)." in out
    assert statuses(runs()) == ["finished", "finished", "failed"]


def test_what_a_process_prints_as_it_starts_is_passed_on(home, faking, study, runs, monkeypatch):
    """As a site hook would, before the worker has its stdout for itself. The worker is a new process."""
    options = faking()
    monkeypatch.setattr(workers, "subprocess", subprocess)
    (home / "sitecustomize.py").write_text("import sys\n\nprint('{}')\nsys.stdout.write('hello')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]))
        code = study(*SEED, "--workers", "1", *options)[0]
    assert code == 0
    assert statuses(runs()) == ["finished"] * 3


def test_a_process_that_hangs_as_it_starts_fails_its_cell(home, faking, study, runs, monkeypatch):
    monkeypatch.setattr(workers, "START_SECONDS", 2.0)
    options = faking()
    (home / "faking.py").write_text(
        "import sys, time\n\nif 'basisadapt.training' in sys.orig_argv:\n    time.sleep(600)\n"
    )
    code, out, _ = study(*SEED, "--timeout", "1", *options)
    assert code == 1
    assert "Failed: fourier seed 1 (took longer than 2 s to start)." in out
    assert statuses(runs()) == ["failed"] * 3


def test_of_a_process_that_ends_the_exit_code_is_told(home, faking, study, monkeypatch):
    options = faking()
    (home / "faking.py").write_text("import os, sys\n\nif 'basisadapt.training' in sys.orig_argv:\n    os._exit(7)\n")
    code, out, _ = study(*SEED, "--workers", "1", "--set", "sweep.basis=sinc", *options)
    assert code == 1
    assert "Failed: LoRA seed 1 (its process ended with exit code 7, twice)." in out


def test_a_result_without_its_score_fails_its_cell_alone(home, faking, study, runs):
    code, out, _ = study(*SEED, "--workers", "1", *faking({("fourier", 1): "no score"}))
    assert code == 1
    assert "Failed: fourier seed 1 (InputError: the run gave no finite 'accuracy'" in out


def test_a_worker_that_is_killed_leaves_no_folder(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import tempfile, time; tempfile.mkdtemp(); print('made', flush=True); time.sleep(600)"
    popen = subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", program], **how))
    executor = workers.Workers(1, JobSettings())
    worker = executor._start()
    assert executor._said.get(timeout=60)[1] == "made\n"
    assert len(list(tmp_path.glob("*/*"))) == 1
    executor.stop()
    assert worker.process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    assert Forked([sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(tmp_path)}).wait() == 9
    (left,) = tmp_path.iterdir()
    scratch.remove_left()
    assert left.exists(), "so young that its process may not have locked it yet"
    mine = scratch.Scratch()
    for folder in (left, mine.path):
        os.utime(folder, (0, 0))
    scratch.remove_left()
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_be_started_is_not_blamed_on_the_record(home, faking, study, runs, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "/full/folder")

    monkeypatch.setattr(workers, "Scratch", full)
    code, _, err = study(*SEED, "--workers", "1", *faking())
    assert (code, err.count("\n")) == (2, 1)
    assert "no process can be started for a cell: " in err
    assert "No space left on device: '/full/folder'" in err
    assert set(statuses(runs())) == {"killed"}


def test_out_of_memory_fails_the_cell_and_the_others_go_on(home, fake, study, runs):
    fake.ways = {("sinc", 1): "big"}
    code, out, _ = study(*SEED)
    assert code == 1
    assert "Failed: sinc seed 1 (out of memory with a batch of 16 (OutOfMemoryError: CUDA out of memory." in out
    assert statuses(runs()) == ["finished", "failed", "finished"]


def test_the_batch_is_halved_where_memory_asks_for_it(home, fake, study, runs):
    fake.ways = {("sinc", 1): "big"}
    code, out, _ = study(*SEED, "--halve-batch")
    assert code == 0
    assert [name for name, _ in fake.ran] == ["lora"] + ["sinc"] * 3 + ["fourier"]
    assert "Warning, sinc seed 1: out of memory with a batch of 8: 4 batches of 4 were accumulated" in out
    assert [run.data.tags.get("basisadapt.accumulate") for run in runs()] == [None, "4", None]
    result = Path(runs()[1].info.artifact_uri.removeprefix("file://")) / "result.json"
    assert '"accumulate": 4' in result.read_text()
    # The setting is none of the configuration's: the cell is done.
    fake.ran.clear()
    assert study(*SEED)[0] == 0
    assert fake.ran == []


def test_a_batch_that_cannot_be_halved_fails(home, fake, study):
    fake.ways = {("sinc", 1): "big"}
    code, out, _ = study(*SEED, "--halve-batch", "--set", "train.batch_size=6")
    assert code == 1
    assert "Failed: sinc seed 1 (out of memory with a batch of 3 (" in out


def test_ctrl_c_once_finishes_the_cell_that_runs(home, fake, study, runs):
    fake.ways = {("sinc", 1): "SIGINT"}
    code, _, err = study(*SEED)
    assert code == 130
    assert "finishing the cells that run; Ctrl-C again stops now" in err
    assert "to resume: python -m basisadapt.study tiny.yaml" in err
    assert statuses(runs()) == ["finished", "finished"]
    assert statuses(runs(parents=True)) == ["killed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("way", ["SIGINT twice", "SIGTERM"])
def test_ctrl_c_twice_and_sigterm_stop_at_once(home, fake, study, runs, trials, way):
    fake.ways = {("sinc", 1): way}
    code, _, _ = study(*SEED)
    assert code == 130
    assert statuses(runs()) == ["finished", "killed"]
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL"]
    fake.ways = {}
    assert study(*SEED)[0] == 0


def test_ctrl_c_in_a_search(home, fake, study):
    add(home, "search: {basis: [gaussian_rbf, bspline]}\n")
    fake.ways = {(basis, 1): "SIGINT" for basis in ("gaussian_rbf", "bspline")}
    search = ("tiny.yaml", "--search", "random", "--trials", "2", "--seeds", "1,2")
    assert study(*search)[0] == 130
    assert len(fake.ran) == 2 + 1  # both cells of the reference, one of the first trial
    fake.ways = {}
    assert study(*search)[0] == 0


@pytest.fixture
def driver(home, faking):
    """A driver with two workers, of which one hangs, and the other one's judge in the last cell; killed at the end."""
    options = faking({("sinc", 1): "hang", ("fourier", 3): "judge hangs"})
    with (home / "faking.py").open("a") as plugin:
        plugin.write("import forked\nfrom basisadapt.training.execution import workers\n\n")
        plugin.write("workers.subprocess = forked.IN_PLACE\n")
    process = Forked([*STUDY, "--workers", "2", *options], stderr=subprocess.PIPE, text=True)
    eventually(lambda: (home / "hanging").exists() or process.poll() is not None)
    yield process
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):  # not read to the end: a worker that is left would hold it open
        if stream is not None:
            stream.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_workers_die_with_their_driver(driver):
    left = workers_of(driver)
    assert left
    assert len({os.getpgid(worker.pid) for worker in left} | {os.getpgid(driver.pid)}) == len(left) + 1
    driver.kill()
    driver.wait()
    assert psutil.wait_procs(left, timeout=120)[1] == []


def test_a_driver_with_workers_is_interrupted_twice(driver, home, runs):
    """At the first Ctrl-C, the worker ends whose judge hangs."""
    left = workers_of(driver)
    eventually((home / "asking").exists)
    driver.send_signal(signal.SIGINT)
    eventually(lambda: "finishing the cells that run" in driver.stderr.readline())
    eventually(lambda: "fourier, seed 3: its process ended with exit code 130" in driver.stderr.readline())
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    assert driver.wait(300) == 130
    assert psutil.wait_procs(left, timeout=120)[1] == []
    assert sorted(statuses(runs())) == ["finished"] * 7 + ["killed"] * 2


def test_cores_and_gpus_are_shared_out(monkeypatch):
    started = []
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.setattr(workers, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def environments(count, name):
        started.clear()
        threads = workers.Workers(count, JobSettings())._threads
        for place in range(count):
            workers._start_process(threads, place, Path("folder"), JobSettings())
        return [env.get(name) for env in started]

    assert environments(3, "OMP_NUM_THREADS") == ["2"] * 3
    assert environments(16, "OMP_NUM_THREADS") == ["1"] * 16
    assert environments(2, "CUDA_VISIBLE_DEVICES") == [None, None]
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 2)
    assert environments(3, "CUDA_VISIBLE_DEVICES") == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(3, "CUDA_VISIBLE_DEVICES") == ["5", "7", "5"]
    assert environments(3, "OMP_NUM_THREADS") == ["3"] * 3


@pytest.fixture
def of_eight_cores(monkeypatch):
    """A machine with eight cores, of which the threads and memory can be set; torch has a thread for each."""

    def machine_with(omp=None, threads=8, memory=1 << 50, accelerated=False):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if omp is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
        monkeypatch.setattr(workers, "cores", lambda: 8)
        monkeypatch.setattr(workers, "free_memory", lambda: memory)
        monkeypatch.setattr(workers, "accelerated", lambda: accelerated)
        monkeypatch.setattr(workers.torch, "get_num_threads", lambda: threads)

    return machine_with


def test_cells_run_side_by_side_with_a_thread_each_as_far_as_memory_goes(of_eight_cores):
    """How many there are changes none of their threads, and so none of their numbers."""
    of_eight_cores()
    executor = workers.local_executor(None, JobSettings())
    executor.prepare(22_000_000)
    assert (executor.slots, executor._threads) == (8, 1)
    for gigabytes, slots in ((100, 8), (22, 3), (7, 1), (1, 1)):
        of_eight_cores(memory=gigabytes << 30)
        executor = workers.local_executor(None, JobSettings())
        executor.prepare(500_000_000)
        assert (executor.slots, executor._threads) == (slots, 1), gigabytes


def test_what_the_user_says_of_threads_and_workers_holds(of_eight_cores):
    of_eight_cores(omp="4", threads=4)
    executor = workers.local_executor(None, JobSettings())
    assert (executor.slots, executor._threads) == (2, 4)
    of_eight_cores(memory=0)
    executor = workers.local_executor(3, JobSettings())
    executor.prepare(500_000_000)
    assert (executor.slots, executor._threads) == (3, 2)


def test_one_process_is_this_one_where_it_has_the_same_threads(of_eight_cores):
    settings, limited = JobSettings(), JobSettings(timeout=9.0)
    of_eight_cores(omp="8")
    assert isinstance(workers.local_executor(None, settings), Inline)
    assert workers.local_executor(None, limited).slots == 1
    of_eight_cores(accelerated=True)
    assert isinstance(workers.local_executor(None, settings), Inline)
    assert workers.local_executor(None, limited).slots == 1


def test_a_container_has_the_cores_and_the_memory_of_its_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    everything = machine.cores(), machine.free_memory()
    assert min(everything) >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("4096\n")
    assert (machine.cores(), machine.free_memory()) == (1, 4096)
    for name, text in (("cpu.max", "max 100000\n"), ("memory.max", "max\n")):
        (tmp_path / name).write_text(text)
    assert machine.cores() == everything[0]
    assert machine.free_memory() > 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--workers", "two"], "invalid int value: 'two'"),
        (["--timeout", "0"], "--timeout must be above 0 seconds, got 0"),
    ],
)
def test_bad_options(folder, fake, study, arguments, message):
    code, out, err = study(*SEED, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]
