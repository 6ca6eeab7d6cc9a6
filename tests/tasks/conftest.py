"""An endpoint for judges, and an empty folder."""

from __future__ import annotations

import pytest

from tests.tasks.endpoint import Endpoint


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as made:
        yield made


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder is the current one."""
    monkeypatch.chdir(tmp_path)
