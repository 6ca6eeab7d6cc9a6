"""The API reference is written without a warning, and has every public module."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_public_module_has_a_page(tmp_path):
    pytest.importorskip("pdoc", reason="needs the extra `docs`")
    command = [sys.executable, ".ci/docs.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    modules = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "basisadapt").rglob("*.py")}
    public = {path.parent if path.name == "__init__" else path for path in modules if path.name != "__main__"}
    if find_spec("triton") is None:
        public -= {Path("basisadapt/phi/kernels_triton"), Path("basisadapt/phi/cells_triton")}
    pages = {page.relative_to(tmp_path).with_suffix("") for page in tmp_path.rglob("*.html")}
    assert pages == public | {Path("index")}
    page = (tmp_path / "basisadapt" / "phi" / "bases.html").read_text(encoding="utf-8")
    assert "B₃(u) = ((2 − |u|)₊³ − 4 (1 − |u|)₊³) / 6" in page
