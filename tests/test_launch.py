"""`python -m basisadapt.launch MODULE ...`: another program, which then knows our methods and a user's plug-ins."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from peft import PeftType
from basisadapt.phi.basis import BASES
known = "BASISADAPT_PHI" in PeftType.__members__, "my_sine" in BASES
print(__name__, sys.argv[1:], *known, __file__.endswith(sys.argv[0]))
sys.exit(7)
"""
BASIS = """
import torch
from basisadapt import TransferBasis
class MySine(TransferBasis, name="my_sine", argument="scaled"):
    def forward(self, u):
        return torch.sin(u)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evaluate_it").mkdir()
    (tmp_path / "evaluate_it" / "__init__.py").touch()
    (tmp_path / "evaluate_it" / "__main__.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "no_program").mkdir()
    (tmp_path / "no_program" / "__init__.py").touch()
    (tmp_path / "my_bases.py").write_text(BASIS, encoding="utf-8")
    return tmp_path


def launch(folder, *arguments):
    command = [sys.executable, "-m", "basisadapt.launch", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_it_runs_a_module_as_python_does_and_peft_knows_us(folder):
    done = launch(folder, "--plugin", "my_bases.py", "evaluate_it", "--model", "hf", "--plugin", "theirs", "--help")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "__main__ ['--model', 'hf', '--plugin', 'theirs', '--help'] True True True\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evaluate_this"], "module 'evaluate_this' cannot be run: there is none of that name, or it has no __main__"),
        (["no_program"], "module 'no_program' cannot be run: there is none of that name, or it has no __main__"),
        (["no.such"], "module 'no.such' cannot be run: No module named 'no'"),
        (["--plugin", "none.py", "evaluate_it"], "plug-in file 'none.py' does not exist"),
        ([], "the following arguments are required: MODULE, ... (--help lists the options)"),
        (["--plug", "x"], "the following arguments are required: MODULE, ... (--help lists the options)"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, told, folder):
    done = launch(folder, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"basisadapt: error: {told}\n")
