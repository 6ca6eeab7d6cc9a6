"""The studies that come with the package: where they are, and their names."""

from __future__ import annotations

from pathlib import Path

from basisadapt.core.errors import InputError


def studies_dir() -> Path:
    """The folder of the shipped studies: in an installed package, or beside the package in a repository."""
    package = Path(__file__).parents[2]
    installed = package / "studies"
    found = installed if installed.is_dir() else package.parent / "studies"
    if not found.is_dir():
        raise InputError(
            f"the studies that come with the package are not beside {str(package)!r}: it must be installed"
        )
    return found


def list_studies() -> list[str]:
    """The names of the shipped studies."""
    return sorted(path.stem for path in studies_dir().glob("*.yaml"))
