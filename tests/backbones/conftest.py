"""A small language model for the tests of backbones."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def folder(language_model, tmp_path):
    """A copy of a small language model, to be damaged."""
    return shutil.copytree(language_model, tmp_path / "model")
