"""An endpoint for judges."""

from __future__ import annotations

import pytest

from tests.tasks.endpoint import Endpoint


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as made:
        yield made
