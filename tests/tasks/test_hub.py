"""Data sets of the hub as tasks; the hub is played by a folder."""

from __future__ import annotations

import pytest

from basisadapt.core.errors import InputError
from tests.tasks.own_files import find, load

pytestmark = pytest.mark.usefixtures("here")


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
