"""The command that draws bases."""

from __future__ import annotations

import pytest

from basisadapt.gallery import main
from basisadapt.phi.basis import BASES

MINE = """
import torch
from basisadapt import TransferBasis
class Mine(TransferBasis, name="gallery_mine"):
    def forward(self, u):
        return torch.tanh(u)
class Wrong(TransferBasis, name="gallery_wrong"):
    def forward(self, u):
        return u.no_such_thing
"""


@pytest.fixture
def plugin(tmp_path):
    before = dict(BASES._classes)
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    yield str(tmp_path / "mine.py")
    BASES._classes = before


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is made."""
    from basisadapt import gallery

    figures, draw = [], gallery.bases_figure
    monkeypatch.setattr(gallery, "bases_figure", lambda curves: figures.append(draw(curves)) or figures[-1])
    return figures


def test_every_registered_basis_is_drawn(tmp_path, drawn):
    assert main([str(tmp_path / "all.png")]) == 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert [title.split(",")[0] for title in panels] == list(BASES)
    assert "fourier,  u = ω x + xᵢ" in panels


def test_a_basis_of_the_user(tmp_path, plugin, drawn):
    assert main([str(tmp_path / "two.svg"), "sinc", "gallery_mine", "--plugin", plugin]) == 0
    sinc, mine = (axes.lines[0] for axes in drawn[0].axes[:2])
    assert max(sinc.get_ydata()) == pytest.approx(1)
    assert mine.get_ydata()[-1] == pytest.approx(0.99933, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png", "sync"], "sinc"),
        (["x.png", "gallery_wrong"], "basis 'gallery_wrong' cannot be drawn"),
        (["x.bmp"], "ends in .png, .svg, .pdf"),
        (["no/such/x.png"], "does not exist"),
        (["x.png", "--plugin", "nowhere.py"], "'nowhere.py' does not exist"),
        ([], "FILE"),
    ],
)
def test_bad_input(arguments, message, plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *(["--plugin", plugin] if "gallery_wrong" in arguments else [])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
