"""The embedded task: its texts are read from the library once, for as long as that does not change."""

from __future__ import annotations

import pytest

from basisadapt.tasks import docstrings

LONG = "A sentence that is long enough to say something, about {}."


@pytest.fixture
def library(monkeypatch, tmp_path):
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "cache"))
    for number in range(docstrings.Docstrings.num_labels + 1):
        package = tmp_path / "library" / f"package{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("", encoding="utf-8")
        texts = [f'def f{i}():\n    """{LONG.format((number, i))}"""\n' for i in range(12 - number)]
        (package / "module.py").write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    return tmp_path / "library"


def load():
    return docstrings.Docstrings().load(None)


def test_the_largest_packages_are_the_classes(library):
    data = load()
    assert len(data.train) + len(data.eval) == sum(range(3, 13))
    assert not any("(10, " in text for text in (*data.train.inputs, *data.eval.inputs)), "the smallest is left out"
    for text, label in zip(data.train.inputs, data.train.labels, strict=True):
        assert f"({data.classes[label].removeprefix('package')}, " in text


def test_docstrings_are_parsed_once(library, monkeypatch):
    first = load()

    def parse(path):
        raise AssertionError(f"{path} is parsed again")

    monkeypatch.setattr(docstrings, "_file_docstrings", parse)
    assert load() == first
    assert load().fingerprint() == first.fingerprint()


def test_a_library_that_changes_is_parsed_again(library):
    first = load()
    (library / "package0" / "more.py").write_text(f'"""{LONG.format("more")}"""\n', encoding="utf-8")
    assert LONG.format("more") in {*load().train.inputs, *load().eval.inputs}
    assert load().fingerprint() != first.fingerprint()
