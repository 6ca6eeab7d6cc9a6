"""Sets of images: folders, IDX files, the hub, digits; and runs on them with tiny models."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from basisadapt import InputError, backbones, tasks
from basisadapt.backbones.clip import ZeroShotCLIP, class_embeddings
from basisadapt.tasks import DataSettings
from basisadapt.tasks.fashion_mnist import FashionMNIST, read_idx
from basisadapt.tasks.hub import ask_hub
from basisadapt.tasks.image import decode
from basisadapt.tasks.vision import Photographs
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.tiny_vision import EPS, save_tiny

# --- image folders ---


class Shapes(Photographs):
    """Three classes, as small as a set can be."""

    folder, hub, num_labels = "shapes", "nobody/shapes", 3


@pytest.fixture
def shapes(tmp_path):
    """A data folder with vision/shapes: three images a class in train, two in test."""
    for part, count in (("train", 3), ("test", 2)):
        for value, name in enumerate(("circle", "ring_road", "square")):
            folder = tmp_path / "vision" / "shapes" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                suffix = (".png", ".JPEG", ".jpg")[i]
                Image.new("RGB", (9, 7), (value, i, 0)).save(folder / f"{i}{suffix}")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_read_in_a_mixed_fixed_order_with_its_names(shapes):
    task = Shapes()
    task.check(shapes)
    data, again = task.load(shapes), task.load(shapes)
    assert (len(data.train), len(data.eval)) == (9, 6)
    assert data.train.labels != sorted(data.train.labels)
    assert data == again
    for rows in (data.train, data.eval):
        names = [Path(path).parent.name for path in rows.inputs]
        assert [["circle", "ring_road", "square"].index(name) for name in names] == list(rows.labels)
    assert data.prompts == (("a photo of a circle.",), ("a photo of a ring road.",), ("a photo of a square.",))
    assert data.classes == ("circle", "ring_road", "square")


def test_the_fingerprint_follows_names_and_sizes_and_not_the_place(shapes, tmp_path_factory):
    before = Shapes().load(shapes).fingerprint()
    elsewhere = shutil.copytree(shapes, tmp_path_factory.mktemp("elsewhere") / "copy")
    assert Shapes().load(elsewhere).fingerprint() == before
    Image.new("RGB", (90, 7)).save(elsewhere / "vision/shapes/test/circle/0.png")
    assert Shapes().load(elsewhere).fingerprint() != before


def test_names_from_a_file(shapes):
    folder = shapes / "vision" / "shapes"
    (folder / "classes.txt").write_text("circle disc, round thing\nring_road ring\nsquare box\n", encoding="utf-8-sig")
    assert [sentences[0] for sentences in Shapes().load(shapes).prompts] == [
        "a photo of a disc.",
        "a photo of a ring.",
        "a photo of a box.",
    ]
    (folder / "classes.txt").write_bytes("circle disc\nsquare café".encode("latin-1"))
    with pytest.raises(InputError, match=r"classes.txt' cannot be read as UTF-8"):
        Shapes().check(shapes)
    (folder / "classes.txt").write_text("circle disc\nsquare\nring_road ring")
    with pytest.raises(InputError, match=r"classes.txt' does not name class 'square'"):
        Shapes().check(shapes)


def test_ids_of_wordnet_are_no_names(shapes):
    for part in ("train", "test"):
        folder = shapes / "vision" / "shapes" / part
        (folder / "circle").rename(folder / "n01440764")
    Shapes().check(shapes)
    with pytest.raises(InputError, match=r"zero_shot needs names of classes: .*classes.txt' is missing"):
        Shapes(DataSettings(head="zero_shot")).check(shapes)


def emptied(folder):
    for path in (folder / "test" / "square").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (emptied, r"class folder '.*test.square' has no image \(.jpg, .jpeg, .png\)"),
        (lambda f: shutil.rmtree(f / "test"), r"image folder '.*test' cannot be read: No such file"),
        (lambda f: (f / "test" / "circle").rename(f / "test" / "cirle"), "has class 'circle' in only one of train and"),
        (lambda f: [shutil.rmtree(f / part / "circle") for part in ("train", "test")], "has 2 classes, expected 3"),
    ],
)
def test_a_bad_layout_is_refused_before_the_work(shapes, damage, message):
    damage(shapes / "vision" / "shapes")
    with pytest.raises(InputError, match=message) as caught:
        Shapes().check(shapes)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_named(shapes):
    (shapes / "vision/shapes/train/circle/0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"image '.*train.circle.0.png' is empty"):
        Shapes().load(shapes)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub by data sets made here; `hub.rows` says of what, `hub.asked` what was asked for."""
    import datasets

    class Hub:
        def __init__(self):
            images = [Image.new("RGB", (5, 5), (i, 0, 0)) for i in range(12)]
            self.rows = {"img": images, "fine_label": list(range(12))}
            self.label = datasets.ClassLabel(names=[f"class_{i}" for i in range(100)])
            self.asked = None

        def load_dataset(self, name, config, revision):
            self.asked = (name, config)
            features = datasets.Features({"img": datasets.Image(), "fine_label": self.label})
            return {part: datasets.Dataset.from_dict(self.rows, features=features) for part in ("train", "test")}

    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    ask_hub.cache_clear()
    yield fake
    ask_hub.cache_clear()


def test_a_hub_set_is_decoded_when_it_is_asked_for(hub, monkeypatch):
    decoded = []
    monkeypatch.setattr("basisadapt.tasks.vision.decode", lambda image: decoded.append(1) or decode(image))
    task = tasks.find("vision/cifar100", DataSettings())
    task.check(None)
    assert hub.asked is None, "nothing is downloaded for a plan"
    data = task.load(None)
    assert hub.asked == ("uoft-cs/cifar100", None)
    assert (len(data.train), len(data.eval), decoded) == (12, 12, [])
    assert len(data.fingerprint()) == 16
    few = data.train.head(5)
    assert (len(few.inputs), decoded) == (5, [])
    assert [decode(few.inputs[i]).getpixel((0, 0))[0] for i in range(5)] == few.labels
    assert len(decoded) == 5
    assert data.train.labels != sorted(data.train.labels)
    assert data.prompts[1][0] == "a photo of a class 1."
    assert data.classes[1] == "class_1"


def test_a_hub_set_that_is_not_as_written(hub, monkeypatch):
    import datasets

    task = tasks.find("vision/cifar100", DataSettings())
    hub.rows = {**hub.rows, "fine_label": [-1] * 12}
    with pytest.raises(InputError, match="hub data set 'uoft-cs/cifar100' has labels outside 0 to 99"):
        task.load(None)
    with pytest.raises(InputError, match=r"'tanganke/sun397': unknown column 'image'.*known: fine_label, img"):
        tasks.find("vision/sun397", DataSettings()).load(None)
    with pytest.raises(InputError, match=r"'ILSVRC/imagenet-1k': unknown split 'validation'.*known: test, train"):
        tasks.find("vision/imagenet", DataSettings()).load(None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("gated\nrepository")))
    with pytest.raises(
        InputError, match=r"vision/pets needs --data-dir or the hub: .* could not be loaded: gated repository"
    ):
        tasks.find("vision/pets", DataSettings()).load(None)


def test_a_broken_image_of_the_hub_and_classes_without_names(hub):
    import datasets

    hub.rows = {**hub.rows, "img": [{"bytes": b"no image", "path": None}] * 12}
    hub.label = datasets.Value("int64")
    data = tasks.find("vision/cifar100", DataSettings()).load(None)
    assert data.prompts == ()
    with pytest.raises(InputError, match=r"the image in row \d+ cannot be read"):
        decode(data.train.inputs[0])


def test_an_image_of_the_hub_is_as_upright_as_one_of_a_folder(hub, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (4, 8)).save(tmp_path / "turned.jpg", exif=exif)
    hub.rows = {**hub.rows, "img": [{"bytes": (tmp_path / "turned.jpg").read_bytes(), "path": None}] * 12}
    data = tasks.find("vision/cifar100", DataSettings()).load(None)
    assert decode(data.train.inputs[0]).size == decode(str(tmp_path / "turned.jpg")).size == (8, 4)


def test_what_starts_a_program_is_no_image_of_the_hub_either(hub, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    hub.rows = {**hub.rows, "img": [{"bytes": EPS, "path": None}] * 12}
    data = tasks.find("vision/cifar100", DataSettings()).load(None)
    with pytest.raises(InputError, match=r"the image in row \d+ cannot be read"):
        decode(data.train.inputs[0])


# --- IDX files and digits ---


def packed(data):
    """The same bytes at any time: they are in the names of tests, which must be the same in every process."""
    return gzip.compress(data, mtime=0)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(params=["vision/fashion_mnist", "fashion-mnist"])
def fashion(tmp_path, request):
    folder = tmp_path / request.param
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None], (count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(packed(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(packed(idx(labels)))
    return folder


def root(folder):
    return folder.parent.parent if folder.name == "fashion_mnist" else folder.parent


def test_idx_files_are_read(fashion):
    data = FashionMNIST().load(root(fashion))
    assert (len(data.train), len(data.eval)) == (20, 10)
    assert data.train.inputs[0].shape == (28, 28)
    assert [image[3, 3] for image in data.train.inputs] == data.train.labels
    assert data.train.labels != sorted(data.train.labels)
    assert data.fingerprint() == FashionMNIST().load(root(fashion)).fingerprint()
    assert data.prompts[9] == ("a photo of a ankle boot.",)
    assert data.classes[9] == "ankle boot"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "cannot be unzipped"),
        (packed(idx(np.zeros((10, 28, 28), np.uint8)))[:40], "cannot be unzipped"),
        (packed(b"\0\0\x0d\x03" + bytes(12)), "is not an IDX file of bytes: it begins with 00 00 0d 03"),
        (packed(b""), "is not an IDX file of bytes: it begins with nothing"),
        (packed(idx(np.zeros((10, 28, 28), np.uint8))[:-1]), r"has 7839 bytes of data, expected \[10, 28, 28\]"),
        (packed(b"\0\0\x08\x01" + bytes(4)), r"has 0 bytes of data, expected \[0\]"),
        (packed(idx(np.zeros((9, 28, 28), np.uint8))), r"have shapes \(9, 28, 28\) and \(10,\)"),
        (packed(idx(np.zeros(10, np.uint8))), r"have shapes \(10,\) and \(10,\)"),
    ],
)
def test_bad_idx_files_are_named(fashion, content, message):
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(InputError, match=rf"t10k-images-idx3-ubyte.gz' .*{message}") as caught:
        FashionMNIST().load(root(fashion))
    assert "\n" not in str(caught.value)


def test_wrong_labels_and_missing_files(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(packed(idx(np.full(20, 10, np.uint8))))
    with pytest.raises(InputError, match=r"train-labels.* has label 10, expected 0 to 9"):
        FashionMNIST().load(root(fashion))
    (fashion / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"has no .*train-labels-idx1-ubyte.gz"):
        FashionMNIST().check(root(fashion))
    with pytest.raises(InputError, match="needs --data-dir"):
        FashionMNIST().check(None)


def test_the_published_files():
    """Debian's package, or a data folder of one's own: 60,000 and 10,000 images, as many of each class."""
    folder = Path(os.environ.get("BASISADAPT_DATA_DIR", "/usr/share/datasets"))
    try:
        FashionMNIST().check(folder)
    except InputError as error:
        pytest.skip(f"needs Fashion-MNIST: {error}")
    data = FashionMNIST().load(folder)
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.eval.labels).tolist() == [1000] * 10
    assert read_idx(FashionMNIST()._files(folder)[0][0]).shape == (60_000, 28, 28)


def test_digits():
    data = tasks.find("vision/digits", DataSettings()).load(None)
    assert (len(data.train), len(data.eval)) == (1438, 359)
    assert set(data.train.labels) == set(data.eval.labels) == set(range(10))
    shades = {int(shade) for image in data.train.inputs for shade in np.unique(image)}
    assert data.classes == tuple("0123456789")
    assert len(shades) == 17
    assert (min(shades), max(shades)) == (0, 255)


# --- runs ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("vit", "dinov2", "clip")}


def config(backbone, method="lora", train=None, **values):
    short = {"max_steps": 3, "batch_size": 8, "train_rows": 100, "eval_rows": 40, **(train or {})}
    settings = {"task": "vision/digits", "adapter": {"r": 4}, "train": short, **values}
    return RunConfig.from_mapping({"backbone": backbone, "method": method, **settings})


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
@pytest.mark.parametrize("method", ["lora", "phi", "head", "full"])
def test_methods_train_images(tiny, kind, method):
    chosen = config(tiny[kind], method)
    result = run(chosen)
    assert result.status == "finished"
    assert {"accuracy", "eval_loss", "generalisation_gap"} <= result.metrics.keys()
    assert result.data == {"fingerprint": result.data["fingerprint"], "train_rows": 100, "eval_rows": 40}
    features = 64 if kind == "dinov2" else 32
    assert result.metrics["parameters.head"] == plan(chosen).head == features * 10 + 10
    adapted = method in ("lora", "phi")
    assert len(result.modules) == plan(chosen).modules == (2 * 6 if adapted else 0)
    kinds = [numbers["kind"] for numbers in result.modules.values()]
    assert (kinds.count("attention"), kinds.count("mlp")) == ((8, 4) if adapted else (0, 0))


@pytest.mark.parametrize("head", ["linear", "zero_shot"])
def test_a_run_repeats_bitwise_and_another_seed_does_not(tiny, head):
    def losses(seed):
        result = run(config(tiny["clip"], seed=seed, data={"head": head}))
        return result.curves["loss"], result.metrics["eval_loss"], result.modules

    assert losses(1) == losses(1)
    assert losses(1)[0] != losses(2)[0]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "zero_shot"])
def test_a_saved_adapter_scores_as_it_did(tiny, kind, tmp_path):
    """Loaded into a fresh backbone, by peft alone: the accuracy and the loss that the run recorded."""
    from peft import PeftModel

    zero_shot = kind == "zero_shot"
    name = tiny["clip" if zero_shot else kind]
    chosen = config(name, "phi", {"lr": 0.02, "max_steps": 10}, data={"head": "zero_shot" if zero_shot else "linear"})
    result = run(chosen, save_to=tmp_path)
    task = tasks.find(chosen.task, chosen.data)
    data = task.load(None)
    base, processor = backbones.load(backbones.find(name), task.form, task.num_labels, prompts=data.prompts)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    rows = data.eval.head(40)
    batch = task.collator(processor)(list(task.examples(rows, processor, 0, training=False)))
    with torch.no_grad():
        loss, scores = task.score(model, batch)
    assert task.measure(scores.numpy(), rows, processor)["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert loss.item() == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def test_a_folder_trains_end_to_end(tiny, shapes):
    """Through the registry and the command's data folder; a file that cannot be decoded is named."""

    class Registered(Photographs, name="vision/shapes"):
        folder, hub, num_labels = "shapes", "nobody/shapes", 3

    try:
        chosen = config(tiny["vit"], task="vision/shapes", train={"max_steps": 2})
        result = run(chosen, data_dir=shapes)
        assert (result.data["train_rows"], result.data["eval_rows"]) == (9, 6)
        path = shapes / "vision/shapes/train/circle/1.JPEG"
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(InputError, match=r"1.JPEG' cannot be read"):
            run(chosen, data_dir=shapes)
    finally:
        tasks.TASKS._classes.pop("vision/shapes")


@pytest.mark.slow
def test_a_small_vit_learns_digits_from_nothing(tiny):
    """17,546 parameters, a minute: 70 % in spite of crops and mirror images, where chance is 10 %."""
    schedule = {"max_steps": 1000, "batch_size": 64, "lr": 3e-3, "schedule": "cosine", "warmup_ratio": 0.1}
    result = run(config(tiny["vit"], "full", {**schedule, "train_rows": None, "eval_rows": None}))
    assert result.metrics["accuracy"] > 0.6


# --- CLIP without a trained head ---


def clip(tiny):
    import transformers

    model = transformers.CLIPModel.from_pretrained(tiny["clip"]).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny["clip"])


PROMPTS = (
    ("a photo of a cat.", "art of the cat."),
    ("a dog.",),
    ("a very long sentence of a bird.", "bird", "a bird."),
)


@torch.no_grad()
def test_class_embeddings_are_the_plain_formula(tiny):
    model, tokenizer = clip(tiny)
    found = class_embeddings(model, tokenizer, PROMPTS)
    for row, sentences in zip(found, PROMPTS, strict=True):
        total = torch.zeros(24)
        for sentence in sentences:  # one by one: padding must not matter
            tokens = tokenizer(sentence, return_tensors="pt")
            hidden = model.text_model(tokens["input_ids"]).last_hidden_state[0, -1]
            embedding = model.text_projection.weight @ hidden
            total += embedding / embedding.norm() / len(sentences)
        assert torch.allclose(row, model.logit_scale.exp() * total / total.norm(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_one_sentence_a_class_the_logits_are_clips_own(tiny):
    whole, tokenizer = clip(tiny)
    prompts = [(f"a photo of a {name}.",) for name in ("cat", "dog", "owl")]
    model, _ = backbones.load(backbones.find(tiny["clip"]), "zero_shot", 3, prompts=prompts)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = tokenizer([sentence for (sentence,) in prompts], padding=True, return_tensors="pt")
    output = model(images, labels=torch.tensor([0, 1, 2, 0]))
    expected = whole(**tokens, pixel_values=images).logits_per_image
    assert torch.allclose(output.logits, expected, rtol=1e-4, atol=1e-4)
    picked = expected.log_softmax(-1)[range(4), [0, 1, 2, 0]]
    assert output.loss.item() == pytest.approx(-picked.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("method", "trained"), [("lora", 3328), ("frozen", 0)])
def test_the_zero_shot_head_does_not_train(tiny, method, trained):
    chosen = config(tiny["clip"], method, data={"head": "zero_shot"})
    result = run(chosen)
    assert plan(chosen).trainable == result.metrics["parameters.trainable"] == trained
    assert result.metrics["parameters.head"] == 0


def test_full_fine_tuning_keeps_the_classes(tiny, tmp_path):
    chosen = config(tiny["clip"], "full", {"lr": 0.01}, data={"head": "zero_shot"})
    run(chosen, save_to=tmp_path)
    prompts = tasks.find(chosen.task, chosen.data).load(None).prompts
    saved = ZeroShotCLIP.from_pretrained(tmp_path)
    assert torch.allclose(saved.classes, class_embeddings(*clip(tiny), prompts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        (
            "dinov2",
            "lora",
            r"\(dinov2\) cannot classify images by sentences .*data.head zero_shot.*, clip-vit-b32 can",
        ),
        ("clip", "head", "trains the task's head, and this model has none"),
    ],
)
def test_what_cannot_be_zero_shot_is_refused_in_the_plan(tiny, kind, method, message):
    with pytest.raises(InputError, match=message):
        plan(config(tiny[kind], method, data={"head": "zero_shot"}))


def test_classes_without_names_cannot_be_zero_shot(tiny):
    with pytest.raises(InputError, match="needs 3 classes with names, but the data has 0"):
        backbones.load(backbones.find(tiny["clip"]), "zero_shot", 3)


# --- the paper's backbones, from shapes ---


def test_the_published_vision_tower():
    tower = backbones.shape_only(backbones.find("clip-vit-b32"), "zero_shot", 1000)
    assert isinstance(tower, ZeroShotCLIP)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 87_849_216


@pytest.mark.parametrize(("backbone", "head"), [("clip-vit-b32", "zero_shot"), ("dinov2-base", "linear")])
def test_adapters_of_the_published_rank(backbone, head):
    settings = {"task": "vision/cifar100", "data": {"head": head}, "adapter": {"r": 16, "preset": "paper"}}
    counts = plan(config(backbone, "phi", **settings))
    block = 4 * (768 + 768) + 2 * (768 + 3072)
    assert (counts.modules, counts.factors, counts.transfer) == (72, 12 * 16 * block, 72 * 2 * 50)
