"""Figures from plain numbers: the right panels, the right lines, and nothing where there is nothing to show."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest

from basisadapt.diagnostics.drawable import check_drawable
from basisadapt.diagnostics.figures import figures, pictures

PROJECTIONS = {"attention.self.query": "attention", "attention.output.dense": "attention", "output.dense": "mlp"}


def plain_result(layers=4, phi=True, landscape=None):
    """A result as `result.json` holds it."""
    modules, curves = {}, {}
    for layer in range(layers):
        for projection, kind in PROJECTIONS.items():
            module = f"encoder.layer.{layer}.{projection}"
            modules[module] = {
                "kind": kind,
                "stable_rank": 1 + layer / 7,
                "dc_share": 0.1,
                "spectrum": [1.0, 0.5, 1e-9],
            }
            if phi:
                modules[module] |= {"omega_mean": 1.0, "alpha_mean_abs": layer / 10}
                curves[module] = {"z": [-1.0, 0.0, 1.0], "phi": [0.0, float(layer), 0.5]}
    ranks = {module: numbers["stable_rank"] for module, numbers in modules.items()}
    snapshots = [
        {"step": 0, "stable_rank": dict.fromkeys(modules, 0.0), "phi": curves},
        {"step": 2, "stable_rank": ranks, "phi": curves},
        {"step": 10, "stable_rank": ranks, "phi": curves},
    ]
    loss = [(step, 0.5 + 2 / step) for step in range(1, 21)]
    smoothness = [(step, 1 / step) for step in range(1, 21)]
    return {
        "modules": modules,
        "phi": curves,
        "snapshots": snapshots,
        "curves": {"loss": loss, "update_smoothness": smoothness, "eval_loss": [(10, 0.8), (20, 0.7)]},
        "metrics": {"eval_loss": 0.7, "generalisation_gap": 0.031},
        "landscape": landscape or {},
    }


@pytest.fixture(scope="module")
def drawn():
    result = plain_result(landscape={"axis": [-1.0, 0.0, 1.0], "loss": [[3.0, 2.0, None], [1.0, 0.5, 1.0], [2, 2, 2]]})
    return figures("sinc", json.loads(json.dumps(result)))


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_every_figure_can_be_saved(drawn, tmp_path):
    assert list(drawn) == [
        "phi.png", "phi_evolution.png", "stable_rank.png", "spectrum.png", "modules.png", "training.png",
        "landscape.png",
    ]  # fmt: skip
    for name, figure in drawn.items():
        figure.savefig(tmp_path / name, dpi=40)
        assert (tmp_path / name).stat().st_size > 1000


def test_phi(drawn):
    assert titles(drawn["phi.png"]) == [*PROJECTIONS, ""]  # the last is the colour bar
    assert [len(axes.lines) for axes in drawn["phi.png"].axes[:3]] == [4, 4, 4]


def test_evolution_shows_first_middle_and_last_layer_at_every_stage(drawn):
    figure = drawn["phi_evolution.png"]
    assert titles(figure) == [f"layer {layer}, {projection}" for layer in (0, 2, 3) for projection in PROJECTIONS]
    assert {len(axes.lines) for axes in figure.axes} == {3}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 2", "step 10", "end"]


def test_stable_rank_leaves_out_a_start_without_updates(drawn):
    attention, mlp = drawn["stable_rank.png"].axes
    assert titles(drawn["stable_rank.png"]) == ["attention", "mlp"]
    assert [line.get_label() for line in attention.lines] == ["modules, end", "step 2", "step 10", "end"]
    assert attention.lines[-1].get_ydata() == pytest.approx([1, 8 / 7, 9 / 7, 10 / 7])
    assert len(mlp.lines[0].get_xdata()) == 4


def test_spectrum_has_a_line_per_module_and_the_median(drawn):
    attention, mlp = drawn["spectrum.png"].axes
    assert (len(attention.lines), len(mlp.lines)) == (9, 5)
    assert list(attention.lines[-1].get_ydata()) == [1.0, 0.5, 1e-9]


def test_module_numbers(drawn):
    figure = drawn["modules.png"]
    assert titles(figure) == ["DC share", "mean |α|", "mean ω"]
    assert [line.get_label() for line in figure.axes[0].lines] == list(PROJECTIONS)


def test_modules_without_phi_beside_modules_with_it(tmp_path):
    """As under `rest: lora`: one projection has none of φ's numbers in any layer."""
    result = plain_result()
    first = next(iter(result["modules"])).rpartition(".")[2]
    for name, numbers in result["modules"].items():
        if name.endswith(first):
            for key in ("omega_mean", "alpha_mean_abs"):
                numbers.pop(key)
            del result["phi"][name]
    drawn = figures("mixed", result)
    for name, figure in drawn.items():
        figure.savefig(tmp_path / name)
    panels = {axes.get_title(): axes for axes in drawn["modules.png"].axes}
    assert len(panels["mean ω"].lines) == len(panels["DC share"].lines) - 1


def test_training(drawn):
    loss, path = drawn["training.png"].axes
    assert loss.get_title() == "loss (generalization gap +0.031)"
    assert [line.get_label() for line in loss.lines][1] == "0.50 + c · t^(-1.00)"
    assert len(path.lines) == 2


def test_without_phi_updates_or_loss():
    drawn = figures("LoRA", plain_result(phi=False))
    assert list(drawn) == ["stable_rank.png", "spectrum.png", "modules.png", "training.png"]
    assert titles(drawn["modules.png"]) == ["DC share"]
    dead = plain_result()
    for numbers in dead["modules"].values():
        numbers.update(stable_rank=0.0, spectrum=[])
    assert "spectrum.png" not in figures("dead", {**dead, "curves": {}})


def test_what_did_not_train_has_no_pictures():
    """A backbone as it is: no modules, no curves."""
    plain = {"modules": {}, "phi": {}, "snapshots": [], "curves": {}, "metrics": {}, "landscape": {}}
    assert pictures("zero-shot", plain) == {}
    assert list(pictures("LoRA", plain_result(phi=False))) == list(figures("LoRA", plain_result(phi=False)))


def test_one_module_outside_any_block(tmp_path):
    result = plain_result()
    result |= {
        "modules": {
            "head": {"kind": "other", "stable_rank": 1.0, "dc_share": 0.0, "spectrum": [1.0], "omega_mean": 1.0}
        },
        "phi": {"head": {"z": [0.0, 1.0], "phi": [0.0, 1.0]}},
        "snapshots": [{"step": 3, "stable_rank": {"head": 1.0}, "phi": {}}],  # not finite then
        "landscape": {"axis": [-1.0, 0.0, 1.0], "loss": [[None] * 3] * 3},
    }
    drawn = figures("one", result)
    for name, figure in drawn.items():
        figure.savefig(tmp_path / name, dpi=40)
    assert titles(drawn["phi_evolution.png"]) == ["layer 0, head"]
    assert math.isclose(drawn["stable_rank.png"].axes[0].get_ylim()[0], 1.0, abs_tol=0.1)


MODULE = "encoder.layer.0.output.dense"
SQUARE = {"axis": [-1.0, 1.0], "loss": [[3.0, None], [1.0, 0.5]]}


@pytest.mark.parametrize("phi", [True, False])
@pytest.mark.parametrize("landscape", [None, SQUARE])
def test_what_a_run_gives_is_drawable(phi, landscape):
    check_drawable(plain_result(phi=phi, landscape=landscape))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("modules", MODULE, "kind"), 3, f"modules.{MODULE}.kind"),
        (("modules", MODULE, "stable_rank"), "high", f"modules.{MODULE}.stable_rank"),
        (("modules", MODULE, "stable_rank"), 1.7e308, f"modules.{MODULE}.stable_rank"),
        (("modules", MODULE, "spectrum"), [1.0, "x"], f"modules.{MODULE}.spectrum"),
        (("modules", MODULE, "spectrum"), None, f"modules.{MODULE}.spectrum"),
        (("phi", MODULE, "z"), [1.0], f"phi.{MODULE}"),
        (("phi", MODULE, "phi"), "abc", f"phi.{MODULE}"),
        (("phi", MODULE), [1.0], f"phi.{MODULE}"),
        (("snapshots", 1, "step"), "first", "snapshots[1].step"),
        (("snapshots", 1, "stable_rank"), {}, "snapshots[1].stable_rank"),
        (("snapshots", 1, "phi"), None, "snapshots[1].phi"),
        (("landscape", "axis"), [1.0], "landscape"),
        (("landscape", "loss", 1), [1.0], "landscape"),
        (("landscape", "loss", 1, 1), "x", "landscape.loss"),
    ],
)
def test_what_has_another_form_is_not(path, value, where):
    odd = plain_result(landscape=copy.deepcopy(SQUARE))
    *way, last = path
    place = odd
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(ValueError, match=f"^{re.escape(where)} must be "):
        check_drawable(odd)
