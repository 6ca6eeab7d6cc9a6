"""Registries, plug-ins and settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from basisadapt import InputError
from basisadapt.core.registry import Registry, load_plugin
from basisadapt.core.settings import from_mapping

MORLET = """
import torch
from basisadapt import TransferBasis

class {name}(TransferBasis, name="{key}"):
    def forward(self, u):
        return torch.cos(5 * u) * torch.exp(-u.square() / 2)
"""


def test_registry():
    registry: Registry[object] = Registry("thing")
    registry.add("first", int)
    assert registry["first"] is int
    assert "second" not in registry
    with pytest.raises(InputError, match="thing 'first' already exists"):
        registry.add("first", str)
    with pytest.raises(InputError, match=r"unknown thing 'frist'; did you mean 'first'\? \(known: first\)"):
        registry["frist"]
    with pytest.raises(InputError, match="may hold only"):
        registry.add("a b", int)


def test_a_plugin_file_registers_once(tmp_path):
    from basisadapt.phi.basis import BASES

    path = tmp_path / "mine.py"
    path.write_text(MORLET.format(name="FileMorlet", key="file-morlet"))
    assert load_plugin(str(path)) is load_plugin(str(path))
    assert BASES["file-morlet"].__name__ == "FileMorlet"
    del BASES._classes["file-morlet"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_the_kind", "nothing_of_the_kind"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import basisadapt\nclass A(basisadapt.TransferBasis, name='a'): pass", "basis 'a' lacks forward$"),
    ],
)
def test_a_broken_plugin_is_one_line(text, message, tmp_path, monkeypatch):
    from basisadapt.phi.basis import BASES

    monkeypatch.setattr(BASES, "_classes", {**BASES._classes})
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_plugin(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_plugin():
    with pytest.raises(InputError, match="does not exist"):
        load_plugin("nowhere.py")
    with pytest.raises(InputError, match="does not import"):
        load_plugin("no_such_module_at_all")


def test_an_installed_package_registers_through_its_entry_point(tmp_path):
    """A distribution as pip leaves it: a module, and metadata with the entry point."""
    (tmp_path / "wavelets.py").write_text(MORLET.format(name="Morlet", key="morlet"))
    info = tmp_path / "wavelets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wavelets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[basisadapt.plugins]\nwavelets = wavelets\nbroken = no_such_module\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from basisadapt.testing import check_basis\n"
        "from basisadapt.phi.settings import PhiSettings\n"
        "PhiSettings(basis='morlet'); check_basis('morlet'); print('registered')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "registered", done.stderr
    assert "plug-in 'broken'" in done.stderr


@dataclass(frozen=True)
class _Settings:
    count: int = 1
    rate: float | str = 1.0
    flag: bool = False
    names: list[str] | None = None


def test_settings_from_a_mapping():
    found = from_mapping(_Settings, {"count": 2.0, "rate": 3, "flag": 1, "names": ["a"]})
    assert found == _Settings(2, 3.0, True, ["a"])
    assert isinstance(found.rate, float)
    assert from_mapping(_Settings, {"rate": "nyquist"}).rate == "nyquist"
    for values, message in [
        ({"count": True}, "count must be a whole number"),
        ({"rate": None}, "rate must be a number or text"),
        ({"flag": "yes"}, "flag must be true or false"),
        ({"names": [1]}, "names must be a list of text or null"),
        ({"cuont": 1}, "unknown key 'here.cuont'; did you mean 'here.count'"),
        ([1], r"here must be keys and values, got \[1\]"),
    ]:
        with pytest.raises(InputError, match=message):
            from_mapping(_Settings, values, "here")


def test_a_plugin_that_raises_is_told_by_the_plan(tmp_path, monkeypatch):
    from basisadapt.adapter.placement import PLACEMENTS
    from basisadapt.training import RunConfig, plan

    monkeypatch.setattr(PLACEMENTS, "_classes", {**PLACEMENTS._classes})
    (tmp_path / "mine.py").write_text(
        "from basisadapt import Placement\n\n\nclass Wrong(Placement, name='wrong-of-a-test'):\n"
        "    def covers(self, projection):\n        return projection.depth > 1\n"
    )
    load_plugin(str(tmp_path / "mine.py"))
    config = RunConfig.from_mapping({"adapter": {"placement": "wrong-of-a-test"}})
    message = r"^a plug-in of method 'phi' does not work: AttributeError: 'Projection' object has no attribute 'depth'$"
    with pytest.raises(InputError, match=message):
        plan(config, dry=True)


def test_a_public_name_that_is_misspelt():
    import basisadapt

    with pytest.raises(AttributeError, match=r"no attribute 'param_group'; did you mean 'param_groups'\?$"):
        _ = basisadapt.param_group
    with pytest.raises(AttributeError, match=r"no attribute 'anything'$"):
        _ = basisadapt.anything
    assert set(basisadapt.__all__) <= set(dir(basisadapt)), "for completion"


def test_of_two_plugins_with_one_name_both_travel(tmp_path):
    from basisadapt.training.execution.ray_executor import _load_plugins, _packed

    packed = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "my_bases.py"
        path.write_text(f"import basisadapt\n\nbasisadapt.{folder}_of_test = True\n")
        packed.append(_packed(str(path)))
    import basisadapt

    _load_plugins(tuple(packed))
    assert vars(basisadapt).pop("a_of_test")
    assert vars(basisadapt).pop("b_of_test")
