"""What a run ran on: package versions, git commit, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("basisadapt", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "optuna", "mlflow")


def environment() -> dict[str, str]:
    """Names to values, all text: git_commit, python, platform, device, threads, and the version of each package.

    git_commit is the commit of this package's source, "unknown" outside a repository. A package that is missing is
    "not installed".
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        **{package: _version(package) for package in PACKAGES},
    }


def git_commit() -> str:
    """The commit of this source, followed by "-dirty" if tracked files differ from it; "unknown" without git."""
    folder = Path(__file__).parent
    try:
        # Only a repository that tracks this very file is ours: a user's own may surround an installed package.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
