"""Pixels: transforms against plain formulas, shapes, determinism, laziness."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from basisadapt import InputError
from basisadapt.tasks import DataSettings, Rows, image
from basisadapt.tasks.digits import Digits
from basisadapt.tasks.image import ATTEMPTS, DRAWS, MEAN, STD, centre_box, decode, pixels, random_box, resolution
from basisadapt.tasks.vision import CIFAR100, ImageNet
from tests.tasks.tiny_vision import EPS

PROCESSOR = SimpleNamespace(size={"height": 12, "width": 12})
sides = st.integers(1, 3000)
uniform = st.floats(0, 1, exclude_max=True)


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def examples(count=6, training=True):
    rows = Rows([picture(20 + i, 30, i) for i in range(count)], list(range(count)))
    return Digits().examples(rows, PROCESSOR, 0, training)


def test_normalisation_is_imagenets():
    plain = Image.new("RGB", (9, 7), (0, 128, 255))
    found = pixels(plain, centre_box(9, 7), 5, flip=False)
    expected = (torch.tensor([0, 128, 255]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(found, expected[:, None, None].expand(3, 5, 5), rtol=0, atol=1e-6)


def test_a_square_of_its_own_size_is_only_normalised():
    source = picture(8, 8)
    expected = (np.asarray(source) / 255 - MEAN) / STD
    for flip, columns in ((False, slice(None)), (True, slice(None, None, -1))):
        found = pixels(source, (0, 0, 8, 8), 8, flip).numpy()
        np.testing.assert_allclose(found, expected[:, columns].transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (64, 64)])
def test_the_centre_is_the_shorter_side_resized_and_the_middle_cropped(width, height):
    source, side = picture(width, height), 32
    resized = source.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    left, upper = (resized.width - side) // 2, (resized.height - side) // 2
    expected = np.asarray(resized.crop((left, upper, left + side, upper + side))) / 255
    found = pixels(source, centre_box(width, height), side, flip=False).numpy().transpose(1, 2, 0) * STD + MEAN
    assert np.abs(found - expected).max() < 1.5 / 255


@given(sides, sides, st.lists(uniform, min_size=DRAWS, max_size=DRAWS))
def test_a_random_crop_lies_inside_and_has_the_first_area_and_ratio_that_fit(width, height, draws):
    left, upper, right, lower = random_box(width, height, draws)
    assert all(isinstance(edge, int) for edge in (left, upper, right, lower))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    for attempt in range(ATTEMPTS):
        area_draw, ratio_draw, left_draw, upper_draw = draws[4 * attempt : 4 * attempt + 4]
        area = width * height * (0.08 + 0.92 * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            assert (right - left, lower - upper) == (w, h)
            assert (left, upper) == (int(left_draw * (width - w + 1)), int(upper_draw * (height - h + 1)))
            return
    assert left in {(width - (right - left)) // 2}
    assert upper in {(height - (lower - upper)) // 2}


def test_a_crop_that_never_fits_is_the_middle_within_the_ratio():
    whole = [0.99] * DRAWS
    assert random_box(1000, 10, whole) == (493, 0, 506, 10)
    assert random_box(10, 1000, whole) == (0, 493, 10, 506)
    assert random_box(1, 1, whole) == (0, 0, 1, 1)


def test_crops_reach_every_edge_and_the_whole_range_of_areas():
    generator = torch.Generator().manual_seed(0)
    boxes = [random_box(60, 60, draws.tolist()) for draws in torch.rand(2000, DRAWS, generator=generator)]
    shares = [(right - left) * (lower - upper) / 3600 for left, upper, right, lower in boxes]
    assert min(shares) < 0.1
    assert max(shares) > 0.95
    assert {min(box[:2]) for box in boxes} >= {0}
    assert max(box[2] for box in boxes) == max(box[3] for box in boxes) == 60


@given(sides.filter(lambda side: side < 80), sides.filter(lambda side: side < 80), st.sampled_from(range(6)))
def test_any_image_becomes_a_square_of_three_colours(width, height, kind):
    mode = ["RGB", "L", "RGBA", "P", "1", "CMYK"][kind]
    rows = Rows([picture(width, height).convert(mode)], [3])
    for training in (True, False):
        (example,) = Digits().examples(rows, PROCESSOR, 0, training)
        assert example["pixel_values"].shape == (3, 12, 12)
        assert example["pixel_values"].dtype == torch.float32
        assert example["pixel_values"].isfinite().all()
        assert example["labels"] == 3


def test_arrays_and_files_are_images(tmp_path):
    source = picture(9, 11)
    source.save(tmp_path / "a.png")
    for same in (np.asarray(source), str(tmp_path / "a.png"), tmp_path / "a.png"):
        assert decode(same).tobytes() == source.tobytes()
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(decode(grey)), np.repeat(grey[..., None], 3, axis=2))


def test_what_starts_a_program_is_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "drawn.png").write_bytes(EPS)
    for source in (str(tmp_path / "drawn.png"), EPS):
        with pytest.raises(InputError, match="cannot be read: cannot identify image file"):
            decode(source)


def test_sixteen_bits_are_the_eight_upper_ones(tmp_path):
    deep = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for source in (str(tmp_path / "deep.png"), (tmp_path / "deep.png").read_bytes(), Image.fromarray(deep), deep):
        assert np.array_equal(np.asarray(decode(source))[..., 0], deep >> 8)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_image_is_upright_wherever_it_comes_from(tmp_path, suffix):
    """As `datasets` decodes those of the hub."""
    path, exif = tmp_path / f"turned{suffix}", Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(8, 16).save(path, exif=exif, quality=100)
    upright = np.rot90(np.asarray(Image.open(path)), -1)
    for source in (str(path), path.read_bytes(), Image.open(path)):
        assert np.array_equal(np.asarray(decode(source)), upright)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("content", ["cut", "text", "nothing"])
def test_a_bad_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    picture(64, 64).save(path)
    path.write_bytes({"cut": path.read_bytes()[:700], "text": b"no image", "nothing": b""}[content])
    with pytest.raises(InputError, match=f"broken{suffix}.* cannot be read") as caught:
        decode(str(path))
    assert "\n" not in str(caught.value)


def test_training_follows_the_seed_and_not_the_threads(monkeypatch):
    def batch(seed, readers):
        monkeypatch.setattr(image, "READERS", readers)
        torch.manual_seed(seed)
        return torch.stack([example["pixel_values"] for example in examples().__getitems__([4, 0, 2, 0])])

    assert torch.equal(batch(1, 1), batch(1, 8))
    assert not torch.equal(batch(1, 1), batch(2, 1))
    first = batch(1, 1)
    assert not torch.equal(first[1], first[3]), "a row that comes again is cropped anew"


def test_evaluation_draws_nothing():
    before = torch.get_rng_state()
    one, other = list(examples(training=False)), list(examples(training=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, other, strict=True))
    assert [e["labels"] for e in examples(training=False)[1:3]] == [1, 2]


def test_nothing_is_decoded_before_its_batch(monkeypatch):
    opened = []
    monkeypatch.setattr(image, "decode", lambda source: opened.append(source) or picture(8, 8))
    rows = Rows([f"{i}.jpg" for i in range(1000)], [0] * 1000)
    sequence = Digits().examples(rows.head(900), PROCESSOR, 0, True)
    assert (len(sequence), opened) == (900, [])
    loader = torch.utils.data.DataLoader(sequence, batch_size=4, collate_fn=Digits().collator(None))
    batch = next(iter(loader))
    assert batch["pixel_values"].shape == (4, 3, 12, 12)
    assert sorted(opened) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_the_resolution_is_the_image_processors():
    crop = SimpleNamespace(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert resolution(crop) == 224
    assert resolution(SimpleNamespace(size={"shortest_edge": 20}, crop_size=None)) == 20
    with pytest.raises(InputError, match=r"gives no height or shortest_edge but .'longest_edge': 9"):
        resolution(SimpleNamespace(size={"longest_edge": 9}))


def test_accuracy_and_top5():
    scores = np.array([[0, 1, 2, 3, 4, 5, 6] + [-1] * 93] * 4, dtype=float)
    rows = Rows([None] * 4, [6, 2, 1, 50])
    assert CIFAR100().measure(scores, rows, None) == {"accuracy": 0.25, "accuracy_top5": 0.5}
    assert Digits().measure(scores[:, :10], Rows([None] * 4, [6, 6, 1, 6]), None) == {"accuracy": 0.75}


def test_sentences_about_classes():
    assert ImageNet().prompts(["tench, Tinca tinca"])[0][0] == "itap of a tench."
    (apple,) = CIFAR100().prompts(["sweet_pepper"])
    assert len(set(apple)) == 18
    assert {"a photo of a sweet pepper.", "a photo of the big sweet pepper."} < set(apple)
    assert Digits(DataSettings(head="zero_shot")).form == "zero_shot"
    with pytest.raises(InputError, match="did you mean 'zero_shot'"):
        DataSettings(head="zeroshot")
