"""Cells as tasks of a Ray cluster."""

from __future__ import annotations

import collections
import random
import threading
import time
from contextlib import suppress

import psutil
import pytest
from common import SEEDS, check_whole, eventually, table_of

from basisadapt.study.record.record import Record


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_cells_run_as_ray_tasks_plugins_travel_and_workers_may_die(home, faking, study, ray, undisturbed):
    table, cells = undisturbed
    draw, killed = random.Random(0), []

    def at_work():
        found = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [child] if child.cmdline()[:1] == ["ray::run_job"] else []
        return found

    def kill():
        while len(killed) < 5:
            eventually(at_work)
            time.sleep(draw.uniform(0.0, 2.0))
            for worker in at_work()[:1]:
                worker.kill()
                killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    code, out, err = study("tiny.yaml", *SEEDS, *faking(seconds=1.5), "--ray", "local")
    killer.join()
    assert (code, table_of(out)) == (0, table), err
    check_whole("sqlite:///mlflow.db", "sqlite:///optuna.db", cells)
    print(f"killed: {len(killed)} Ray workers")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_ray_node_is_killed_and_its_cells_run_elsewhere(home, faking, study, ray, undisturbed):
    from ray.cluster_utils import Cluster

    table, cells = undisturbed
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()

        def kill():
            eventually(
                lambda: len([o for o in Record("sqlite:///mlflow.db", "tiny").outcomes().values() if o.done]) > 7
            )
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        code, out, err = study("tiny.yaml", *SEEDS, *faking(seconds=2.0), "--ray", cluster.address)
        killer.join()
    finally:
        cluster.shutdown()
    assert (code, table_of(out)) == (0, table), err
    check_whole("sqlite:///mlflow.db", "sqlite:///optuna.db", cells)
    ran = collections.Counter(
        o.environment["ray_node"] for o in Record("sqlite:///mlflow.db", "tiny").outcomes().values()
    )
    print(f"cells by node: {dict(ran)}")
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray", "local", "--timeout", "5"], "--timeout does not go with --ray"),
        (["--ray", "local", "--workers", "2"], "--workers does not go with --ray"),
        (["--cpus-per-cell", "2"], "go with --ray"),
        (["--ray", "local", "--cpus-per-cell", "0"], "--cpus-per-cell must be above 0, got 0"),
        (["--ray", "local", "--gpus-per-cell", "-1"], "--gpus-per-cell must be at least 0, got -1"),
    ],
)
def test_bad_options_of_a_cluster(home, fake, study, arguments, message):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    code, _, err = study("tiny.yaml", *arguments)
    assert code == 2
    assert message in err
    assert fake.ran == []
