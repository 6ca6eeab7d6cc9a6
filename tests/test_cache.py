"""What is made once is kept in the user's cache, and read only where it is whole."""

from __future__ import annotations

import pytest

from basisadapt.core.cache import cache_folder, kept


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_value_is_made_once(folder):
    made = []
    values = [kept("value.json", lambda: made.append(1) or {"é": [1, 2]}) for _ in range(2)]
    assert values == [{"é": [1, 2]}] * 2
    assert made == [1]
    assert [path.name for path in folder.iterdir()] == ["value.json"], "nothing half done is left"


def test_a_value_that_cannot_be_read_is_made_again(folder):
    kept("value.json", lambda: 1)
    (folder / "value.json").write_bytes(b"\xff[1, ")
    assert kept("value.json", lambda: 2) == 2
    assert kept("value.json", lambda: 3) == 2


def test_without_a_cache_a_value_is_made_every_time(folder):
    folder.write_text("a file where the folder would be")
    assert kept("value.json", lambda: 1) == 1
    assert kept("value.json", lambda: 2) == 2
    assert cache_folder() == folder
