"""The command that tells where a nonlinearity pays."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers

from basisadapt import spectra
from basisadapt.adapter import fit
from basisadapt.spectra import Update, main, rank_of, report

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 30}
FLAT = "attention.self.query"  # the update of these is Gaussian, that of all other matrices of rank one


def body():
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model("bert", **SMALL))


def tuned(scale=1e-2):
    """The body behind a head, changed."""
    config = transformers.AutoConfig.for_model("bert", num_labels=3, **SMALL)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.bert.load_state_dict(body().state_dict(), strict=False)
    with torch.no_grad():
        for name, weight in model.bert.named_parameters():
            if ".layer." in name and weight.dim() == 2:
                rows, columns = weight.shape
                flat = torch.randn(rows, columns)
                weight += scale * (flat if FLAT in name else flat[:, :1] @ torch.randn(1, columns))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pretrained model and what fine-tuning made of it, in one file and in several, and in 16 bits."""
    folder = tmp_path_factory.mktemp("models")
    body().save_pretrained(folder / "base")
    tuned().save_pretrained(folder / "tuned")
    tuned().save_pretrained(folder / "parts", max_shard_size="20KB")
    tuned(1e-4).bfloat16().save_pretrained(folder / "half")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(fit, "STEPS", 25)


def told(capsys, *arguments):
    assert main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("other", ["tuned", "parts"])
def test_the_verdict_follows_the_spectrum(folders, other, capsys):
    flat = told(capsys, folders / "base", folders / other, "--rank", 2, "--modules", rf".*{FLAT}")
    assert re.search("^Here phi helps: of the update BA of rank 2 captures", flat, re.MULTILINE)
    assert "in 2 of the 2 matrices that were fitted, of 2" in flat
    steep = told(capsys, folders / "base", folders / other, "--rank", 2, "--modules", ".*(key|value)")
    assert "Here phi does not help: of the update BA of rank 2 captures 100.0 %" in steep
    assert "the best is as BA of rank 1." in steep
    assert "in 0 of the 4 matrices" in steep
    assert "rounding" not in flat + steep


def test_all_projections_are_looked_at_and_some_fitted(folders, capsys):
    text = told(capsys, folders / "base", folders / "tuned", "--rank", 1, "--fit", 3)
    rows = [line for line in text.splitlines() if line.startswith("encoder.layer.")]
    assert len(rows) == 12
    assert sum("help" in row for row in rows) == 3
    assert "of the 3 matrices that were fitted, of 12" in text
    one = next(row for row in rows if "layer.0.attention.self.query" in row)
    change = (
        tuned().bert.get_submodule(f"encoder.layer.0.{FLAT}").weight
        - body().get_submodule(f"encoder.layer.0.{FLAT}").weight
    ).detach()
    sigma = torch.linalg.svdvals(change.double())
    assert f"32 x 32  {sigma.norm():.3g}" in one
    assert f"{sigma.square().sum() / sigma[0] ** 2:.2f}" in one
    assert f"{100 * sigma[0] ** 2 / sigma.square().sum():.1f} %" in one


@pytest.mark.parametrize(("blocks", "size"), [(24, 7), (12, 6), (6, 6)])
@pytest.mark.parametrize("fits", [12, 24])
def test_matrices_of_every_kind_and_depth_are_fitted(blocks, size, fits):
    places = spectra.spread_places(blocks * size, fits)
    assert len(places) == fits
    kinds = {place % size for place in places}
    assert len(kinds) >= (size if fits > 12 else size - 1), (
        "evenly spread places are of one kind where blocks are alike"
    )
    assert max(places) >= (blocks - 1) * size
    assert min(places) < size


def test_no_more_are_fitted_than_there_are():
    assert spectra.spread_places(5, 9) == spectra.spread_places(5, 5) == set(range(5))
    assert spectra.spread_places(5, 1) == {0}


def test_the_same_as_json(folders, capsys):
    arguments = (folders / "base", folders / "tuned", "--rank", 1, "--fit", 3)
    text = told(capsys, *arguments)
    found = json.loads(told(capsys, *arguments, "--json"))
    assert [one["module"] for one in found["modules"]] == [
        line.split()[0] for line in text.splitlines() if line.startswith("encoder.layer.")
    ]
    assert text.endswith("\n".join(found["verdict"]) + "\n")
    assert sum(one["phi"] is not None for one in found["modules"]) == 3
    for one in found["modules"]:
        assert (len(one["captured"]), one["shape"][0] in (32, 48)) == (32, True)
        assert one["captured"][-1] == pytest.approx(1)
        assert one["stable_rank"] >= 1
    only = json.loads(json.dumps(spectra.document([update((1.0,), 0.5)], 1)))
    assert only["modules"][0]["exponent"] == 1.0
    unknown = dataclasses.replace(update((1.0,), 0.5), exponent=math.nan)
    assert spectra.document([unknown], 1)["modules"][0]["exponent"] is None


def test_a_model_with_a_head_may_be_the_base(folders, capsys):
    text = told(capsys, folders / "tuned", folders / "base", "--rank", 2, "--modules", rf".*0\.{FLAT}")
    assert "bert.encoder.layer.0.attention.self.query" in text


def test_rounding_is_spoken_of(folders, capsys):
    text = told(capsys, folders / "base", folders / "half", "--rank", 2, "--modules", ".*value")
    assert re.search("Some [0-9]+ % of this update is the rounding of the tuned weights", text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_is_expected_to_be(dtype):
    exact = torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 20
    error = (exact.to(dtype).double() - exact).square().sum().item()
    assert spectra._rounding(exact.to(dtype)) == pytest.approx(error, rel=0.02)
    assert spectra._rounding(torch.zeros(3, 3, dtype=dtype)) == 0


def update(captured, phi, sine=0.0, norm=1.0):
    return Update("m", (4, 4), norm, 1.0, 1.0, captured, 0.0, phi, sine)


def test_phi_helps_where_it_captures_more_than_ba_of_the_next_rank():
    shares = (0.5, 0.7, 0.9, 1.0)
    assert [rank_of(shares, share) for share in (0.1, 0.5, 0.50001, 0.6, 0.9, 1.0)] == [1, 1, 1, 2, 3, 4]
    assert "Here phi does not help" in report([update(shares, 0.7)], 1)
    assert "Here phi helps" in report([update(shares, 0.5, sine=0.71)], 1), "a fixed function is one too"
    text = report([update(shares, 0.71)], 1)
    assert "Here phi helps: of the update BA of rank 1 captures 50.0 %, phi(BA) of that rank 71.0 %" in text
    assert "the best is as BA of rank 3." in text


def test_several_updates_are_one_by_their_energy():
    both = [update((0.5, 1.0), 0.6, norm=3.0), update((0.2, 1.0), 1.0, norm=1.0)]
    text = report(both, 1)
    assert "BA of rank 1 captures 47.0 %, phi(BA) of that rank 64.0 %" in text


@pytest.mark.parametrize(("sine", "what"), [(0.8, "A fixed sine is enough."), (0.55, "Learning the function pays.")])
def test_the_sine_says_whether_learning_pays(sine, what):
    assert what in report([update((0.5, 0.6, 0.7, 1.0), 0.8, sine)], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "base"], "do not differ in any of 12 matrices"),
        (["base", "tuned", "--rank", "32"], "--rank must be below 32, the smaller side of 'encoder.layer.0"),
        (["base", "tuned", "--rank", "0"], "--rank and --fit must be at least 1, got 0 and 12"),
        (["base", "tuned", "--modules", "("], r"--modules '\(' is not a regular expression"),
        (["base", "tuned", "--modules", "nothing"], "no module of .* is chosen; --modules names some: it has "),
        (["base", "other"], "'encoder.layer.0.intermediate.dense' is 48 x 32 in .* and 40 x 32 in .*: another model"),
        (["base", "llama"], "has no 'encoder.layer.0.attention.output.dense', as .* does: it is another model"),
        (["base", "pickled"], "has no safetensors; pickled weights are not read"),
        (["base", "damaged"], "has a damaged safetensors file"),
        (["base", "broken"], "lacks model-0000.-of-0000..safetensors, which its model.safetensors.index.json names"),
        (["base", "minilm2"], "unknown backbone 'minilm2'; did you mean 'minilm'"),
        (["base", "/nowhere"], "backbone '/nowhere' is neither a folder here nor an id of the hub: check the path"),
    ],
)
def test_what_cannot_be_compared_is_refused(folders, arguments, message, capsys, tmp_path):
    base, other, *rest = arguments
    if other not in ("base", "tuned", "minilm2", "/nowhere"):
        make(other, tmp_path)
        other = tmp_path
    elif other in ("base", "tuned"):
        other = folders / other
    assert main([str(folders / base), str(other), *rest]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


def make(kind, folder):
    """A checkpoint that does not do."""
    if kind == "llama":
        shapes = {**SMALL, "num_key_value_heads": 2}
        config = transformers.AutoConfig.for_model("llama", **shapes)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        return
    config = transformers.AutoConfig.for_model("bert", **{**SMALL, "intermediate_size": 40 if kind == "other" else 48})
    transformers.AutoModel.from_config(config).save_pretrained(
        folder, max_shard_size="60KB" if kind == "broken" else "1GB"
    )
    weights = sorted(folder.glob("*.safetensors"))
    if kind == "damaged":
        weights[0].write_bytes(b"no safetensors")
    if kind == "pickled":
        weights[0].rename(folder / "pytorch_model.bin")
    if kind == "broken":
        weights[-1].unlink()


def test_nothing_but_what_is_asked_for_is_fitted(folders, monkeypatch, capsys):
    fitted = []
    monkeypatch.setattr(fit, "fitted_energy", lambda change, settings: fitted.append(change.shape) or 0.5)
    told(capsys, folders / "base", folders / "tuned", "--fit", 2)
    assert fitted == [(32, 32)] * 4, "phi and the sine, to two matrices"


def adapted(part, scale=1e-2):
    """The body with `part` of the update that `tuned` has, and with as much energy of another one."""
    before, after = body(), tuned(scale).bert
    torch.manual_seed(9)
    with torch.no_grad():
        for name, weight in before.named_parameters():
            if FLAT in name and weight.dim() == 2:
                update = after.get_parameter(name) - weight
                other = torch.randn_like(update)
                other -= (other * update).sum() / update.square().sum() * update
                weight += part**0.5 * update + (1 - part) ** 0.5 * other / other.norm() * update.norm()
    return before


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_the_share_of_an_update_that_another_has_is_that_of_its_best_multiple(size):
    generator = torch.Generator().manual_seed(0)
    T, D = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    (multiple,) = torch.linalg.lstsq(D.reshape(-1, 1), T.reshape(-1, 1)).solution.flatten()
    expected = 1 - (T - multiple * D).square().sum() / T.square().sum()
    assert spectra.aligned_energy(T, size * D) == pytest.approx(expected.item())
    assert spectra.aligned_energy(T, -size * T) == pytest.approx(1)
    assert spectra.aligned_energy(T, 0 * D) == spectra.aligned_energy(0 * T, D) == 0


def test_a_trained_adapter_is_held_against_the_best_fit(folders, tmp_path, capsys):
    adapted(0.3).save_pretrained(tmp_path / "adapted")
    arguments = (folders / "base", folders / "tuned", "--rank", 2, "--modules", rf".*{FLAT}")
    without = told(capsys, *arguments)
    text = told(capsys, *arguments, "--adapted", tmp_path / "adapted")
    assert "adapted" not in without
    assert "adapted" in text.splitlines()[0]
    assert "the best multiple of the adapted model's update captures 30.0 %, where phi(BA) of rank 2 could" in text
    found = json.loads(told(capsys, *arguments, "--adapted", tmp_path / "adapted", "--json"))
    assert [one["adapted"] for one in found["modules"]] == [pytest.approx(0.3, rel=1e-4)] * 2
    assert found["verdict"] == text.splitlines()[-len(found["verdict"]) :]
    assert {one["adapted"] for one in json.loads(told(capsys, *arguments, "--json"))["modules"]} == {None}


def test_an_adapted_model_that_cannot_be_compared_is_refused(folders, tmp_path, capsys):
    make("other", tmp_path)
    for other, message in (
        (folders / "base", "has nothing of that update in any of 2 matrices"),
        (tmp_path, "another model"),
    ):
        arguments = [folders / "base", folders / "tuned", "--adapted", other, "--fit", 1]
        if other != tmp_path:
            arguments += ["--modules", f".*{FLAT}"]
        assert main([str(one) for one in arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_page_for_practitioners_shows_the_command_as_it_is(monkeypatch):
    """Its command parses, its program trains the model that the command looks at, and it names every column."""
    page = (Path(__file__).parents[1] / "docs" / "where-a-nonlinearity-pays.md").read_text(encoding="utf-8")
    command, third = re.findall(r"^python -m basisadapt.spectra (.+)$", page, re.MULTILINE)
    options = spectra._parser().parse_args(command.split())
    assert spectra._parser().parse_args(third.split()).adapted == "merged"
    assert options.base == "minilm"
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ran = []
    monkeypatch.setattr("basisadapt.training.running.run", lambda config, **options: ran.append((config, options)))
    exec(program, {})
    ((config, settings),) = ran
    assert (config.method, config.backbone, str(settings["save_to"])) == ("full", options.base, options.tuned)
    assert all(head in page for head in spectra.HEAD), "every column is explained"
