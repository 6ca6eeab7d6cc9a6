"""An endpoint for judges."""

from __future__ import annotations

import pytest

from tests.tasks.endpoint import Endpoint


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()
