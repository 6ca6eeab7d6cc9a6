"""Whatever a user hands over is taken whole, or refused in one line: study files, settings, adapters, data, results."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import shutil
import signal
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save

from basisadapt import InputError, PhiConfig
from basisadapt.adapter.placement import target_pattern
from basisadapt.methods.abba import ABBAConfig
from basisadapt.methods.aurora import AuroRAConfig
from basisadapt.methods.dylora import DyLoRAConfig
from basisadapt.methods.elalora import ElaLoRAConfig
from basisadapt.methods.nola import NoLAConfig
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.keys import known_keys
from basisadapt.study.plan.published import published_values
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies, studies_dir
from basisadapt.study.plan.spec import PRESETS
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.study.plan.yaml_text import parse_yaml
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.json_lines import CellLine, ResultLine, parse_result, read_lines
from tests.conftest import model_of
from tests.tasks import test_fuzz as of_data

SECONDS = 30  # that one input may take
SHARES = {"studies": 0.25, "settings": 0.3, "adapters": 0.15, "data": 0.1, "lines": 0.2}

# --- values ---

WORDS = (
    "",
    "sinc",
    "x0.5",
    "x9e9",
    "depth:1:2",
    "depth:1:inf",
    "normal:1e9",
    "nyquist",
    "first_last:9",
    "a{99999999999}",
    *("(", "../../x.csv", "/etc/passwd", "..", "hub:a/b", "a/b", "é\ud800", "\0", "word " * 300, "nan", "1e999"),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value, above=()):
    """Where there is something in nested lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from places(item, (*above, key))


@st.composite
def changed(draw, whole, new=values):
    """A copy of lists and mappings with one to three places dropped, renamed or filled with something else."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(sorted(places(whole), key=str)))
        inner = whole
        for key in way:
            inner = inner[key]
        how = draw(st.sampled_from(["drop", "rename", "fill", "fill", "fill"]))
        old = inner.pop(last)
        if how == "rename" and isinstance(inner, dict):
            inner[f"{last}{draw(st.sampled_from(['s', '.r', '=1', '']))}"] = old
        elif how == "fill" and isinstance(inner, dict):
            inner[last] = copy.deepcopy(draw(new))
        elif how == "fill":
            inner.insert(last, copy.deepcopy(draw(new)))
        if not list(places(whole)):
            break
    return whole


def cut(text):
    """A text with a piece of it replaced."""
    pieces = st.one_of(st.text(max_size=6), st.sampled_from(["*a", "&a", "- ", ": ", "\t", "{", "]", "!!set", "\n"]))
    places = st.tuples(st.integers(0, len(text)), st.integers(0, 12), pieces)
    return places.map(lambda cut: text[: cut[0]] + cut[2] + text[cut[0] + cut[1] :])


# --- a study's file ---

STUDIES = {name: (studies_dir() / f"{name}.yaml").read_text(encoding="utf-8") for name in list_studies()}
WIDE = ("r", "num_basis", "train.batch_size", "gain", "interval", "lora_alpha", "train.max_steps")
LAUGHS = (f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}" if i else "x"] * 9) + "]" for i in range(12))
BROKEN = (
    "a: &a [*a]",
    "a: &a {b: *a}",
    "x: 0x" + "f" * 6000,
    "seeds: [" + "1" * 6000,
    "seeds: [2001-99-99]",
    "? [a]\n: b",
    "base: " + "[" * 5000,
    "base: " + "{a: " * 3000,
    "!!binary x",
    "base: !!python/object:os.system x",
    "\0",
    "",
    "- 1",
    *("title: !!set {a, b}", "like: like.yaml", "like: ../../x.yaml", "like: fuzz.yaml", "sweep: {r: [1: 2]}"),
    *("seeds: [1:1:1]", "base: {<<: 1}", "beside: true", "\n".join(LAUGHS)),
    "sweep: {" + ", ".join(f"{key}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for key in WIDE) + "}",
)


def dumped(whole):
    return yaml.safe_dump(whole, sort_keys=False)


def study_texts():
    named = st.sampled_from(sorted(STUDIES))
    return st.one_of(
        named.flatmap(lambda name: changed(parse_yaml(STUDIES[name], name))).map(dumped),
        named.flatmap(lambda name: changed(parse_yaml(STUDIES[name], name))).map(dumped),
        named.flatmap(lambda name: cut(STUDIES[name])),
        st.tuples(named, st.sampled_from(BROKEN)).map(lambda two: f"{STUDIES[two[0]]}\n{two[1]}\n"),
        st.sampled_from(BROKEN).map(lambda text: f"title: T\nquestion: Q\n{text}\n"),
    )


def read_study(folder, case):
    text, preset = case
    path = folder / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    spec = read_spec(str(path))
    published_values(spec.answers)
    study = resolve_tuning(spec, preset=preset)
    assert all(cell.key for cells in study.candidates for one in cells for cell in one.row.cells)


# --- settings ---

MODEL = model_of(f"model.layers.{i}.self_attn.{name}_proj" for i in range(20) for name in "qkvo")


def texts_of(value):
    try:
        return json.dumps(value)
    except (ValueError, TypeError):
        return str(value)[:50]


def changes():
    keys = st.one_of(
        st.sampled_from(known_keys()), st.sampled_from(["adapter", "r", "seed", "train.", "=", "sweep.", ""])
    )
    kind = st.sampled_from(["", "", "", "sweep.", "tune."])
    text = st.one_of(values.map(texts_of), st.sampled_from([text.partition(": ")[2] for text in BROKEN]))
    change = st.tuples(kind, keys, st.sampled_from(["=", "=", "=", ""]), text).map("".join)
    return st.lists(change, min_size=1, max_size=3).map(lambda changed: ("changes", changed))


def mappings():
    default = RunConfig.from_mapping({}).to_mapping()
    return changed({**default, "method": "phi"}).map(lambda values: ("mapping", values))


def take_settings(folder, case):
    kind, given = case
    if kind == "changes":
        resolve(read_spec("ablate_alpha"), changes=given)
        return
    if not all(isinstance(key, str) for key in given):
        given = {str(key): value for key, value in given.items()}
    config = RunConfig.from_mapping(given)
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config
    target_pattern(config.adapter.placement, MODEL)


# --- adapters ---

CONFIGS = (PhiConfig, PhiConfig, ABBAConfig, AuroRAConfig, DyLoRAConfig, ElaLoRAConfig, NoLAConfig)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.config = {"model_type": "tiny"}

    def forward(self, x):
        return self.second(self.first(x))


def adapters(root):
    """Folders of sound adapters, by their configuration's class: (configuration, tensors)."""
    made = {}
    for cls in CONFIGS:
        folder = root / cls.__name__
        get_peft_model(Tiny(), cls(r=2, target_modules=["first", "second"])).save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        made[cls.__name__] = config, load_file(folder / "adapter_model.safetensors")
    return made


@st.composite
def adapter_files(draw, made):
    config, tensors = made[draw(st.sampled_from([cls.__name__ for cls in CONFIGS]))]
    if draw(st.booleans()):
        size = st.sampled_from([0, 1, 7, 2**20, 10**12, 2**62, 10**400, -1, 4097, "8", None, [8], True, 0.5])
        config = draw(changed(config, st.one_of(size, values)))
    known = {one[0]["peft_type"] for one in made.values()}
    if config.get("peft_type") not in sorted(known):  # peft, which chooses the class by it, has its own words
        config["peft_type"] = made["PhiConfig"][0]["peft_type"]
    how = draw(
        st.sampled_from(
            ["sound", "sound", "shape", "dtype", "drop", "rename", "extra", "bytes", "huge", "pickle", "none"]
        )
    )
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    if how == "shape":
        tensors[name] = torch.zeros(draw(st.lists(st.integers(0, 9), max_size=3)))
    elif how == "dtype":
        tensors[name] = tensor.to(
            draw(st.sampled_from([torch.int8, torch.int64, torch.bool, torch.float16, torch.float64]))
        )
    elif how in ("drop", "rename"):
        del tensors[name]
        if how == "rename":
            tensors[name + draw(st.sampled_from(["s", ".weight", ".default"]))] = tensor
    elif how == "extra":
        tensors[draw(st.text(min_size=1, max_size=8))] = tensor.clone()
    content = save({key: value.contiguous() for key, value in tensors.items()})
    if how == "bytes":
        content = draw(of_data.damaged(content))
    elif how == "huge":
        header = json.dumps({name: {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
        content = len(header).to_bytes(8, "little") + header
    return config, how, content


def load_adapter(folder, case):
    config, how, content = case
    here = folder / "adapter"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    (here / "adapter_config.json").write_text(json.dumps(config))
    if how != "none":
        (here / f"adapter_model.{'bin' if how == 'pickle' else 'safetensors'}").write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(Tiny(), str(here))
    except InputError:
        raise
    except ValueError as error:  # what peft says of its own settings, with target_modules as they are
        raise InputError(" ".join(str(error).split())) from error
    except RuntimeError as error:  # torch lists the shapes, one a line
        if "size mismatch" not in str(error):
            raise
        raise InputError(" ".join(str(error).split())) from error
    assert model(torch.zeros(2, 6)).shape == (2, 6)


# --- lines ---

RESULT = {
    "status": "finished",
    "headline": "accuracy",
    "metrics": {"accuracy": 0.5, "eval_loss": 1},
    "curves": {"loss": [[1, 0.5], [2, 0.25]]},
    "modules": {"a": {"kind": "mlp", "stable_rank": 1.5, "spectrum": [1.0]}},
    "phi": {"a": {"z": [0.0], "phi": [1.0]}},
    "snapshots": [{"step": 0, "stable_rank": {"a": 1.0}, "phi": {}}],
    "landscape": {},
    "warnings": ["w"],
    "data": {"rows": 3},
    "environment": {"torch": "2"},
    "accumulate": 1,
}
CELL = {"study": "s", "row": "sinc", "key": "0" * 16, "config": RunConfig.from_mapping({}).to_mapping()}
LINE = {**CELL, "host": "h", "began": 1.0, "ended": 2.0, "error": "", "traceback": "", "result": RESULT}


def line_files():
    line = changed(LINE).map(lambda values: json.dumps(values) + "\n")
    sound = json.dumps(LINE) + "\n"
    odd = [
        "[" * 10000 + "\n",
        '{"a": ' * 5000 + "\n",
        "1" * 6000 + "\n",
        '{"began": ' + "1" * 6000 + "}\n",
        "NaN\n",
        "null\n",
        "\n",
    ]
    text = st.one_of(line, line, st.lists(line, max_size=3).map("".join), cut(sound), st.sampled_from(odd))
    return st.tuples(text, st.sampled_from([ResultLine, ResultLine, CellLine]))


def read_results(folder, case):
    text, kind = case
    path = folder / "lines.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for line in read_lines(path, kind, "--import"):
        config = RunConfig.from_mapping(line.config)
        assert config.to_mapping()
        if kind is ResultLine and line.result is not None:
            assert dataclasses.asdict(parse_result(line.result))


# --- data ---


def read_data(folder, case):
    file, kind = case
    if refusal := of_data.check(folder, file, kind):
        raise InputError(refusal)


# --- all of them ---


def hang(*_):
    raise AssertionError(f"not done after {SECONDS} seconds")


def tally(count, strategy, take, folder, derandomize):
    """Inputs by what became of them. Stops at the first that ends in anything but acceptance or an InputError.

    derandomize: the same inputs every time.
    """
    found = collections.Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(strategy)
    def body(case):
        signal.alarm(SECONDS)
        try:
            take(folder, case)
        except InputError as error:
            if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
                raise AssertionError("not one short line") from error
            found["refused"] += 1
        except BaseException:
            found["traceback"] += 1
            raise
        else:
            found["accepted"] += 1
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, hang)  # the alarm of pytest-timeout too, whose place this one takes
    body()
    return found


def told(name, one):
    accepted, refused = one["accepted"], one["refused"]
    rest = one.total() - accepted - refused
    return f"{name}: {one.total()} inputs tried / {accepted} accepted / {refused} clean refusals / {rest} tracebacks"


def fuzz(count, folder, monkeypatch, derandomize):
    monkeypatch.chdir(folder)
    made = adapters(folder)
    cases = {
        "studies": (st.tuples(study_texts(), st.sampled_from(PRESETS)), read_study),
        "settings": (st.one_of(changes(), mappings()), take_settings),
        "adapters": (adapter_files(made), load_adapter),
        "data": (st.tuples(of_data.files, of_data.kinds), read_data),
        "lines": (line_files(), read_results),
    }
    found = {name: tally(round(count * SHARES[name]), *cases[name], folder, derandomize) for name in cases}
    total = sum(found.values(), collections.Counter())
    for name, one in {**found, "all": total}.items():
        print(told(name, one))
    return total


def test_some_inputs(tmp_path, monkeypatch):
    found = fuzz(200, tmp_path, monkeypatch, derandomize=True)
    assert found["accepted"] > 10
    assert found["refused"] > 10


@pytest.mark.slow
def test_ten_thousand_inputs(tmp_path, monkeypatch, capsys):
    with capsys.disabled():
        found = fuzz(10_000, tmp_path, monkeypatch, derandomize=False)
    assert found.total() >= 10_000
