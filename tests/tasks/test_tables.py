"""Files of rows: what each format may hold, what is refused and how."""

from __future__ import annotations

import json

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from basisadapt.core.errors import InputError
from tests.tasks.own_files import ROWS, find, load, refused, write, write_csv

pytestmark = pytest.mark.usefixtures("here")


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


def test_a_million_columns_are_not_listed():
    write("a.csv", ",".join(f"column_{i}" for i in range(1_000_000)) + "\n")
    assert len(refused("a.csv")) < 2000
