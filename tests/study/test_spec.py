from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import basisadapt
from basisadapt.core.errors import InputError
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.changes import Changes, split_changes
from basisadapt.study.plan.published import published_values
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies


@pytest.fixture
def spec(folder):
    return read_spec("tiny.yaml")


def settings(row):
    return row.cells[0].config.to_mapping()


def test_every_shipped_study_resolves_under_every_preset():
    assert "ablate_basis" in list_studies()
    for name in list_studies():
        spec = read_spec(name)
        for preset in spec.presets:
            assert resolve(spec, preset=preset).cells
        published_values(spec.answers)


def test_ablate_basis_stands_beside_table_13():
    study = resolve(read_spec("ablate_basis"))
    labels = ["sinc", "gaussian_rbf", "bspline", "fourier", "polynomial", "LoRA", "paper sinc", "linear", "sine"]
    assert [row.label for row in study.rows] == labels
    published = published_values(study.spec.answers)
    assert [published[row.published] for row in study.rows[:2]] == [("61.1", "0.2"), ("60.4", "0.3")]
    assert all(row.published in published for row in study.rows if row.label not in ("LoRA", "linear", "sine"))


def test_rows_and_cells(spec):
    study = resolve(spec)
    assert [row.label for row in study.rows] == ["sinc", "fourier", "LoRA"]
    assert [row.published for row in study.rows] == [("basis=sinc",), ("basis=fourier",), None]
    assert [cell.seed for cell in study.rows[0].cells] == [1, 2, 3]
    assert settings(study.rows[0])["train"]["lr"] == 2e-3  # YAML 1.1 would make it text
    assert len({cell.key for cell in study.cells}) == 9


def test_later_overrides_win(spec):
    study = resolve(spec, changes=["train.max_steps=7", "adapter.basis=bspline", "r=2"])
    assert [settings(row)["train"]["max_steps"] for row in study.rows] == [7, 7, 7]  # --set over preset
    assert [settings(row)["adapter"]["r"] for row in study.rows] == [2, 2, 2]
    assert settings(study.rows[0])["adapter"]["basis"] == "sinc"  # the axis over --set
    assert settings(resolve(spec, preset="smoke").rows[0])["train"]["max_steps"] == 2


def test_presets_replace_axes_and_the_command_line_replaces_them(folder):
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("seeds: [1]}", "seeds: [1], sweep.basis: [bspline]}"))
    spec = read_spec("tiny.yaml")
    assert [row.label for row in resolve(spec, preset="smoke").rows] == ["bspline", "LoRA"]
    changed = resolve(spec, preset="smoke", changes=["sweep.basis=sinc", "sweep.gain=1"])
    assert [row.label for row in changed.rows] == ["sinc, 1", "LoRA"]


def test_factors_of_the_base(folder):
    path = folder / "tiny.yaml"
    more = "  - {label: half, set: {train.lr: x0.5, adapter.r: x2}}\n"
    path.write_text(path.read_text().replace("reference:", f"{more}reference:"))
    row = resolve(read_spec("tiny.yaml"), changes=["train.lr=3e-3"]).rows[-1]
    assert (settings(row)["train"]["lr"], settings(row)["adapter"]["r"]) == (pytest.approx(1.5e-3), 8)
    path.write_text(path.read_text().replace("train.lr: x0.5", "train.epochs: x0.5"))
    with pytest.raises(InputError, match=r"train.epochs is set to x0.5, a factor, but the base has no number"):
        resolve(read_spec("tiny.yaml"))


def test_a_file_like_another(folder):
    (folder / "second.yaml").write_text(
        "title: T\nquestion: Q\nlike: tiny.yaml\nbase: {adapter: {r: 2}}\nsweep: {basis: [bspline]}\n"
        "presets: {quick: {train.lr: 1e-4}}\n"
    )
    study = resolve(read_spec("second.yaml"))
    assert [row.label for row in study.rows] == ["bspline"]
    assert [cell.seed for cell in study.cells] == [1, 2, 3]
    config = settings(study.rows[0])
    assert (config["adapter"]["r"], config["train"]["lr"], config["train"]["max_steps"]) == (2, 1e-4, 5)
    (folder / "second.yaml").write_text("title: T\nquestion: Q\nlike: ablate_bases\n")
    with pytest.raises(InputError, match="did you mean 'ablate_basis'"):
        read_spec("second.yaml")


def test_what_a_value_of_an_axis_sets(folder):
    """Over the base, below preset, command line and the row itself; rows beside take the task's."""
    path = folder / "tiny.yaml"
    where = (
        "given: {basis=sinc: {r: 6, train.lr: 5e-3, train.max_steps: 9}, 'task=glue/rte': {train.batch_size: 8}}\n"
        "sweep: {basis: [sinc, fourier], task: [docstrings, glue/rte]}"
    )
    path.write_text(path.read_text().replace("sweep: {basis: [sinc, fourier]}", where))
    spec = read_spec("tiny.yaml")

    def values(*changes):
        configs = {row.label: settings(row) for row in resolve(spec, changes=changes).rows}
        train = {label: config["train"] for label, config in configs.items()}
        assert {train["sinc, docstrings"]["max_steps"]} == {5}, "the preset's"
        return {k: (c["adapter"]["r"], train[k]["lr"], train[k]["batch_size"]) for k, c in configs.items()}

    assert values() == {
        "sinc, docstrings": (6, 5e-3, 16),
        "sinc, glue/rte": (6, 5e-3, 8),
        "fourier, docstrings": (4, 2e-3, 16),
        "fourier, glue/rte": (4, 2e-3, 8),
        "LoRA, docstrings": (4, 2e-3, 16),
        "LoRA, glue/rte": (4, 2e-3, 8),
    }
    assert values("adapter.r=2")["sinc, docstrings"] == (2, 5e-3, 16)
    named = resolve(spec).cells[0].named
    assert {"adapter.r", "train.lr", "train.batch_size", "adapter.basis", "task", "method"} <= set(named)


def test_published_rows_by_label_and_columns_by_method(folder):
    path = folder / "tiny.yaml"
    answers = (
        "answers: {table: table_12.csv, key: config, column: {phi: lr_lora_mean, lora: lora_mean}, "
        "std: {phi: lr_lora_std}, rows: {'phi, 4': rank=4, 'lora, 4': rank=4}}"
    )
    sweep = "sweep: {method: [phi, lora], r: [4]}"
    text = path.read_text().replace("sweep: {basis: [sinc, fourier]}", sweep)
    path.write_text("\n".join(answers if line.startswith("answers") else line for line in text.splitlines()))
    study = resolve(read_spec("tiny.yaml"))
    published = published_values(study.spec.answers)
    assert [published.get(row.published) for row in study.rows] == [("58.1", "0.3"), ("52.8", None), None]


def test_rows_are_told_apart_by_their_values_and_not_by_their_labels(folder):
    """A label or a value that looks like several, or like AXIS=VALUE, is one."""
    path = folder / "tiny.yaml"
    text = path.read_text().replace("label: LoRA", 'label: "LoRA, glue/rte, r=4"')
    path.write_text(text.replace("reference: LoRA", 'reference: "LoRA, glue/rte, r=4"'))
    study = resolve(read_spec("tiny.yaml"), changes=["sweep.task=docstrings,glue/rte"])
    assert [row.point for row in study.rows[:2]] == [
        (("basis", "sinc"), ("task", "docstrings")),
        (("basis", "sinc"), ("task", "glue/rte")),
    ]
    beside = study.rows[-2:]
    assert [row.point for row in beside] == [(("task", "docstrings"),), (("task", "glue/rte"),)]
    assert {row.name for row in beside} == {"LoRA, glue/rte, r=4"}
    assert [row.label for row in beside] == ["LoRA, glue/rte, r=4, docstrings", "LoRA, glue/rte, r=4, glue/rte"]
    assert [row.is_reference for row in study.rows] == [False] * 4 + [True] * 2


def test_seeds_come_from_study_preset_or_command_line(spec):
    assert len(resolve(spec).cells) == 9
    assert [cell.seed for cell in resolve(spec, preset="smoke").cells] == [1, 1, 1]
    assert [cell.seed for cell in resolve(spec, preset="smoke", seeds=[5, 4, 5]).rows[0].cells] == [5, 4]


def test_sweep_axes_are_replaced_and_added(spec):
    study = resolve(spec, changes=["sweep.basis=bspline,sinc", "sweep.adapter.gain=1,1e1"])
    labels = ["bspline, 1", "bspline, 10.0", "sinc, 1", "sinc, 10.0", "LoRA"]
    assert [row.label for row in study.rows] == labels
    assert study.rows[1].published == ("basis=bspline,adapter.gain=10.0",)
    assert settings(study.rows[3])["adapter"]["gain"] == 10.0


def test_the_key_is_of_study_configuration_and_seed_alone(spec):
    plain, same = resolve(spec), resolve(spec, preset="smoke", changes=["train.max_steps=5"], seeds=[1, 2, 3])
    assert [c.key for c in plain.cells] == [c.key for c in same.cells]
    other = resolve(spec, changes=["train.lr=1e-3"])
    assert not {c.key for c in plain.cells} & {c.key for c in other.cells}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.rr=2"], "did you mean 'adapter.r'"),
        (["train.lrr=2"], "did you mean 'train.lr'"),
        (["sweep.bases=sinc"], "unknown key 'bases'"),
        (["sweep.basis=sync"], "did you mean 'sinc'"),
        (["sweep.basis="], "at least one value"),
        (["adapter.r=four"], "adapter.r must be a whole number, got 'four'"),
        (["adapter.r=4,8"], "adapter.r must be a whole number"),
        (["adapter.num_basis=0"], "num_basis must be at least 1"),
        (["adapter.interval=0"], "interval must be above 0"),
        (["adapter.omega_init=-1"], "omega_init must be above 0"),
        (["adapter.grid=uniformm"], "did you mean 'uniform'"),
        (["adapter.sharing=nonee"], "did you mean 'none'"),
        (["task=docstring"], "did you mean 'docstrings'"),
        (["backbone=minilmm"], "did you mean 'minilm'"),
        (["method=loora"], "unknown method 'loora'"),
        (["train.lr"], "--set needs key=value"),
        (["train.lr=[1"], "--set train.lr is not valid YAML"),
        (["sweep.basis=sinc,sinc"], "two rows called 'sinc'"),
        (["adapter.r=1" + "0" * 18], "r must be at least 1 and at most 16384"),
        (["adapter.r=1" + "0" * 30], "a number beyond 64 bits"),
        (["adapter.num_basis=4097"], "num_basis must be at least 1 and at most 4096, got 4097"),
        (["adapter.gain=1e7"], "gain must be above 0, from 1e-6 to 1e6"),
        (["adapter.omega_init=1e-7"], "omega_init must be above 0, from 1e-6 to 1e6"),
        (["adapter.amplitude_init=normal:1e9"], "amplitude_init must be"),
        (["adapter.dense_gradient=sketch:" + "9" * 5000], '"sketch:K" with K from 2 to 999'),
        (["train.lr=.inf"], "train.lr must be above 0, got inf"),
        (["train.epochs=.inf"], "train.epochs must be above 0"),
        (["train.weight_decay=.inf"], "train.weight_decay must be at least 0"),
        (["method=nola", "num_random=16385"], "num_random must be at least 1 and at most 16384"),
        (["method=aurora", "num_knots=4097"], "num_knots must be at least 2 and at most 4096"),
        (["method=sinelora", "frequency=1e7"], "frequency must be above 0 and at most 1e6"),
        (["method=elalora", "spare=101"], "spare must be at least 0 and at most 100"),
        (["task=" + "x" * 9999], "unknown task 'xxx"),
        (["sweep.basis=" + ",".join(["sinc"] * 101), "sweep.r=" + ",".join(["4"] * 100)], "at most 10,000 cells"),
        (["task=2001-01-01"], "unknown task '2001-01-01'"),
    ],
)
def test_bad_changes(spec, changes, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as caught:
        resolve(spec, changes=changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("title: Two bases", "", "title is missing"),
        ("title:", "tittle: x\ntitle:", "unknown key 'tittle'"),
        ("[sinc, fourier]", "sinc", "sweep.basis must be a list"),
        ("label: LoRA, ", "", r"key 'beside\[0\].label' is missing"),
        ("set: {method: lora}", "sett: {}", "did you mean 'beside\\[0\\].set'"),
        ("smoke:", "smook:", "did you mean 'smoke'"),
        ("seeds: [1]}", "sweep.basis: sinc}", "sweep.basis must be a list"),
        ("seeds: [1, 2, 3]", "seeds: [1, a]", "seeds must be a list of a whole number"),
        ("title:", "title: [", "is not valid YAML"),
        ("sweep:", "given: {bases=sinc: {r: 2}}\nsweep:", "given.bases=sinc must be AXIS=VALUE of the sweep with keys"),
        ("title:", "x: &a [*a]\ntitle:", "aliases are not supported"),
        ("title:", "x: &a [1]\ny: *a\ntitle:", "aliases are not supported"),
        ("title:", "title: x\ntitle:", "title is given more than once"),
        ("set: {method: lora}", "set: {method: lora, method: dora}", "method is given more than once"),
        ("title:", "x: " + "[" * 5000 + "\ntitle:", "nested too deeply"),
        ("title:", "x: 0x" + "f" * 5000 + "\ntitle:", "a number beyond 64 bits"),
        ("title:", "x: " + "1" * 5000 + "\ntitle:", "is not valid YAML"),
        ("title:", "x: !!set {a}\ntitle:", "could not determine a constructor"),
        ("title:", "1: 2\ntitle:", "must hold keys and values"),
        ("seeds: [1]}", "1: 2}", "presets.smoke must hold keys and values"),
        ("title:", "claims: true\ntitle:", "claims must be a list, got True"),
        ("title:", "like: tiny.yaml\ntitle:", "like leads back to 'tiny.yaml'"),
        ("title:", "like: ../tiny.yaml\ntitle:", "like must be the name of a file in the same folder, got '../tiny"),
        ("title:", "like: /elsewhere/tiny.yaml\ntitle:", "like must be the name of a file in the same folder"),
        ("title:", "like: ..\ntitle:", "unknown study '..'"),
        (
            "table_13.csv",
            "../../x.csv",
            "answers.table must be the name of a file in the same folder, got '../../x.csv'",
        ),
        ("task: docstrings", "task: ../mine.csv", "task leads out of the folder; give '../mine.csv' with --set"),
        ("task: docstrings", "task: /data/mine.csv", "task leads out of the folder"),
        ("backbone: minilm", "backbone: ../model", "backbone leads out of the folder"),
        ("base: {", "base: {data: {test: ../x.csv}, ", "test leads out of the folder"),
        ("sweep: {", "sweep: {task: [../x.csv], ", "task leads out of the folder"),
        ("smoke: {", "smoke: {sweep.task: [a/../../x.csv], ", "sweep.task leads out of the folder"),
        ("set: {method", "set: {task: ../x.csv, method", "task leads out of the folder"),
        ("sweep:", "given: {basis=sinc: 2}\nsweep:", "given.basis=sinc must be AXIS=VALUE of the sweep .*, got 2"),
        (
            "sweep:",
            "given: {basis=sinc: {0: null}}\nsweep:",
            "given.basis=sinc must be AXIS=VALUE of the sweep with keys",
        ),
        ("set: {method", "set: {0: 1, method", "beside"),
        ("base:", "base: {0: 1}\nx:", "base"),
    ],
)
def test_bad_files(folder, before, after, message):
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError, match=message) as caught:
        read_spec("tiny.yaml")
    assert "tiny.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_or_too_large(folder):
    path = folder / "tiny.yaml"
    path.write_bytes(b"title: \xff")
    with pytest.raises(InputError, match=r"'tiny.yaml' cannot be read: UnicodeDecodeError"):
        read_spec("tiny.yaml")
    path.write_text("title: T\n" + "#" * 1_000_000)
    with pytest.raises(InputError, match=r"'tiny.yaml' must have at most 1,000,000 bytes"):
        read_spec("tiny.yaml")


def test_a_path_of_the_command_line_is_free(spec, folder):
    rows = resolve(spec, changes=["task=../mine.csv"]).rows
    assert rows[0].task == "../mine.csv"


def test_bad_names(spec, folder):
    with pytest.raises(InputError, match="did you mean 'ablate_basis'"):
        read_spec("ablate_bases")
    with pytest.raises(InputError, match="cannot be read"):
        read_spec("elsewhere.yaml")
    with pytest.raises(InputError, match="unknown preset 'paper'"):
        resolve(spec, preset="paper")
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("reference: LoRA", "reference: lora"))
    with pytest.raises(InputError, match="unknown reference row 'lora'"):
        resolve(read_spec("tiny.yaml"))


@pytest.mark.parametrize(
    "text",
    ["a #1/x.csv", "a: b.csv", *(f"{sign}a.csv" for sign in "@%&*[{'\"`!|"), "1.csv", "no/a.csv", "- a.csv", " a.csv"],
)
def test_texts_of_the_command_line_are_texts(text):
    assert split_changes([f"task={text}", f"data.test={text}"]).overrides == {"task": text, "data.test": text}
    assert split_changes([f"sweep.task={text},b.csv"]).sweep == {"task": [text.strip(), "b.csv"]}
    assert split_changes([f"data.label={text}"]).overrides == {"data.label": text}


def test_what_is_no_text_is_read_as_before():
    given = ["data.label=2", "data.second=null", "data.test=~", "train.lr=1e-3", "r=8", "adapter.target_modules=[a, b]"]
    assert split_changes([*given, "adapter.gain=learned:30", "sweep.amplitude_init=zero, normal:1"]) == Changes(
        {
            "data.label": "2",
            "data.second": None,
            "data.test": None,
            "train.lr": 1e-3,
            "adapter.r": 8,
            "adapter.target_modules": ["a", "b"],
            "adapter.gain": "learned:30",
        },
        {"amplitude_init": ["zero", "normal:1"]},
        {},
    )
    assert split_changes(["target_modules=[qk]_proj|.*#x"]).overrides == {"adapter.target_modules": "[qk]_proj|.*#x"}


def test_without_the_shipped_studies_it_is_said_why(tmp_path):
    """As from a zip file, where no study would be known."""
    package = Path(basisadapt.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as packed:
        for path in package.rglob("*.py"):
            packed.write(path, path.relative_to(package.parent))
    command = [sys.executable, "-m", "basisadapt.study", "ablate_basis"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package.zip")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "the studies that come with the package are not beside" in done.stderr
