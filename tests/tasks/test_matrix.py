"""Given matrices, and the weight that is fitted to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from basisadapt import InputError, backbones
from basisadapt.backbones.bert_parts import LastQuery, QueryWeight
from basisadapt.methods import METHODS
from basisadapt.tasks import TASKS, DrawnTask
from basisadapt.tasks.matrix import MatrixTask
from basisadapt.training import attach, load_data, plan, run
from basisadapt.training.config import RunConfig
from basisadapt.training.observation import adapted_layers

TARGETS = sorted(name for name in TASKS if name.startswith("matrix/") and issubclass(TASKS[name], DrawnTask))
SIZE = 64


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a two-layer BERT with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": SIZE, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", vocab_size=30, **small)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def weight():
    """A weight that is not square."""
    return QueryWeight(torch.from_numpy(np.random.default_rng(7).normal(size=(96, 160))).float())


def config(bert, task="matrix/gaussian", method="lora", seed=1, adapter=None, **train):
    return RunConfig.from_mapping(
        {
            "task": task,
            "backbone": str(bert),
            "method": method,
            "adapter": {"r": 4, **(adapter or {})},
            "train": {"batch_size": 1, "max_steps": 3, "lr": 1e-2, **train},
            "seed": seed,
        }
    )


def target_of(task, weight, seed=0):
    rows = TASKS[task]().of_seed(seed).train
    (example,) = TASKS[task]().examples(rows, weight, None, True)
    return example["target"].double().numpy()


def test_there_are_targets_of_every_kind():
    assert {"matrix/gaussian", "matrix/sparse", "matrix/block", "matrix/sign", "matrix/rounding"} < set(TARGETS)
    assert all(issubclass(TASKS[name], MatrixTask) for name in TARGETS)
    assert {name for name in TASKS if name.startswith("matrix/")} == {*TARGETS, "matrix/update"}


@pytest.mark.parametrize("task", TARGETS)
def test_a_target_follows_from_the_seed_and_has_norm_one(task, weight):
    first, again, other = (target_of(task, weight, seed) for seed in (0, 0, 1))
    assert first.shape == (96, 160)
    assert np.linalg.norm(first) == pytest.approx(1, rel=1e-6)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    task = TASKS[task]()
    assert task.of_seed(0).train == task.of_seed(0).eval
    assert task.of_seed(0).fingerprint() == task.of_seed(1).fingerprint()


@pytest.mark.parametrize(
    ("task", "exponent"),
    [("matrix/flat", 0), ("matrix/power_half", 0.5), ("matrix/power_1", 1), ("matrix/power_2", 2)],
)
def test_spectra_fall_by_a_power_law(task, exponent, weight):
    sigma = np.linalg.svd(target_of(task, weight), compute_uv=False)
    expected = np.arange(1, 97.0) ** -exponent
    np.testing.assert_allclose(sigma, expected / np.linalg.norm(expected), rtol=1e-3)


def test_targets_are_what_they_are_called(weight):
    sparse, block, sign = (target_of(f"matrix/{name}", weight) for name in ("sparse", "block", "sign"))
    assert 0.01 < np.mean(sparse != 0) < 0.03
    filled = np.kron(np.eye(8), np.ones((12, 20)))
    assert np.array_equal(block != 0, filled != 0)
    assert np.unique(np.abs(sign)).size == 1
    assert np.linalg.matrix_rank(sign) > 90, "the matrix whose signs they are has rank 4"


def test_rounding_leaves_fifteen_values_to_a_group(weight):
    """W − T is on a grid of whole multiples, -7 to 7, of one scale in every group of 64 inputs."""
    W = weight.weight.double().numpy()
    raw = TASKS["matrix/rounding"]().target(np.random.default_rng(3), W)
    order = np.random.default_rng(3).permutation(160)
    for columns in np.split(order, [64, 128]):
        scale = np.abs(W[:, columns]).max(axis=1, keepdims=True) / 7
        levels = (W - raw)[:, columns] / scale
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-9)
        assert np.abs(levels).max() == pytest.approx(7)
        assert np.all(np.abs(raw[:, columns]) <= scale / 2 + 1e-12)


@pytest.mark.parametrize("task", TARGETS)
def test_energy_and_the_optimum(task, weight):
    """The truncated singular value decomposition captures what optimum.K says, to float64's rounding."""
    chosen, rows = TASKS[task](), TASKS[task]().of_seed(5).train
    T = chosen._target(rows.inputs[0], weight)
    U, sigma, Vt = np.linalg.svd(T, full_matrices=False)
    for rank in (1, 4, 64):
        best = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        measured = chosen.measure(best[None], rows, weight)
        assert measured["energy"] == pytest.approx(measured[f"optimum.{rank}"], abs=1e-12)
    assert measured["optimum.128"] == pytest.approx(1), "96 singular values are all"
    nothing = np.zeros((1, 96, 160), dtype=np.float32)
    assert chosen.measure(nothing, rows, weight)["energy"] == pytest.approx(0, abs=1e-12)


@torch.no_grad()
def test_the_model_gives_the_change_of_its_weight(bert):
    model, known = backbones.load(backbones.find(str(bert)), "weight", 1)
    assert isinstance(model, LastQuery)
    whole = transformers.AutoModel.from_pretrained(bert)
    name = "encoder.layer.1.attention.self.query.weight"
    assert [name for name, _ in model.named_parameters()] == [name]
    W = whole.get_parameter(name)
    assert torch.equal(known.weight, W)
    change, T = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    model.get_parameter(name).add_(change)
    output = model(weight=W[None], target=T[None], labels=torch.tensor([0]))
    torch.testing.assert_close(output.logits, change[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, ((change - T).norm() / T.norm()) ** 2)


def test_ba_comes_to_the_optimum_and_not_beyond(bert):
    result = run(config(bert, "matrix/power_1", lr=0.03, max_steps=150))
    assert result.headline == "energy"
    optimum = result.metrics["optimum.4"]
    assert optimum - 1e-5 < result.metrics["energy"] < optimum + 1e-6
    assert result.metrics["energy"] == pytest.approx(1 - result.metrics["eval_loss"], abs=1e-5)
    assert result.metrics["parameters.trainable"] == 4 * 2 * SIZE
    assert list(result.modules) == ["encoder.layer.1.attention.self.query"]
    assert result.modules["encoder.layer.1.attention.self.query"]["kind"] == "attention"


def test_full_fine_tuning_is_the_target(bert):
    assert run(config(bert, method="full", max_steps=100)).metrics["energy"] > 0.99


@pytest.mark.parametrize("method", ["lora", "phi", "sinelora", "abba", "hira", "dora", "randlora"])
@torch.no_grad()
def test_what_is_measured_is_the_change_that_a_method_says_it_makes(method, bert):
    base, known = backbones.load(backbones.find(str(bert)), "weight", 1)
    model = attach(base, METHODS[method](), config(bert, method=method), "weight").eval()
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    W = known.weight[None]
    measured = model(weight=W, target=W, labels=torch.tensor([0])).logits
    ((_, layer),) = adapted_layers(model)
    assert measured.norm() > 0.01 * W.norm()
    torch.testing.assert_close(measured[0], METHODS[method]().weight_change(layer), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"validation": 0.2}}, "which task 'matrix/gaussian' cannot"),
        (
            {"train": {"precision": "bf16"}},
            "a small change of a weight; train.precision and train.weights must be fp32",
        ),
        (
            {"train": {"weights": "bf16"}},
            "a small change of a weight; train.precision and train.weights must be fp32",
        ),
        ({"backbone": "qwen2-0.5b"}, r"cannot be fitted to a given matrix .*, minilm can"),
        ({"task": "matrix/gausian"}, "did you mean 'matrix/gaussian'"),
    ],
)
def test_what_has_no_meaning_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        plan(RunConfig.from_mapping({"task": "matrix/gaussian", **values}), dry=True)


# --- real updates ---


@pytest.fixture
def updates(tmp_path):
    """Writes matrices of the weight's shape as the data folder's, unless there are others; returns the folder."""

    def write(**matrices):
        generator = np.random.default_rng(1)
        drawn = {name: generator.normal(size=(SIZE, SIZE)).astype(np.float32) for name in ("b", "a", "c")}
        save_file(matrices or drawn, tmp_path / "updates.safetensors")
        return tmp_path

    return write


def test_a_seed_takes_one_of_the_updates(bert, updates):
    folder = updates()
    written = load_file(folder / "updates.safetensors")
    data = [load_data(config(bert, "matrix/update", seed=seed), folder) for seed in range(4)]
    assert [one.about["matrix"] for one in data] == ["a", "b", "c", "a"]
    assert len({one.fingerprint() for one in data}) == 3
    weight = QueryWeight(torch.zeros(SIZE, SIZE))
    (example,) = TASKS["matrix/update"]().examples(data[1].train, weight, None, True)
    expected = written["b"].astype(np.float64)
    np.testing.assert_allclose(example["target"], expected / np.linalg.norm(expected), rtol=1e-6)


def test_a_real_update_is_fitted(bert, updates):
    result = run(config(bert, "matrix/update", lr=0.03, max_steps=150), data_dir=updates())
    assert result.metrics["optimum.4"] - 1e-3 < result.metrics["energy"] < result.metrics["optimum.4"] + 1e-6
    assert result.data["matrix"] == "b"


def test_an_update_that_has_changed_is_another(bert, updates):
    seen = config(bert, "matrix/update")
    first = load_data(seen, updates())
    again = load_data(seen, updates(b=np.ones((SIZE, SIZE), dtype=np.float32)))
    assert first != again
    assert first.fingerprint() != again.fingerprint()


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (None, "'matrix/update' needs updates.safetensors in the data folder"),
        ({"a": np.ones((3, SIZE))}, f"'a' of .* is 3 x {SIZE}, and the weight that is fitted {SIZE} x {SIZE}"),
        ({"a": np.zeros((SIZE, SIZE))}, "must be finite and not 0"),
        ({"a": np.full((SIZE, SIZE), np.nan)}, "must be finite and not 0"),
    ],
)
def test_what_is_no_update_is_refused(bert, updates, tmp_path, matrices, message):
    folder = tmp_path if matrices is None else updates(**matrices)
    with pytest.raises(InputError, match=message):
        run(config(bert, "matrix/update"), data_dir=folder)


def test_updates_need_a_folder_and_a_whole_file(bert, tmp_path):
    with pytest.raises(InputError, match=r"needs a data folder with updates\.safetensors: --data-dir"):
        plan(config(bert, "matrix/update"), dry=True)
    (tmp_path / "updates.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        run(config(bert, "matrix/update"), data_dir=tmp_path)
    save_file({}, tmp_path / "updates.safetensors")
    with pytest.raises(InputError, match="must hold at least one matrix"):
        run(config(bert, "matrix/update"), data_dir=tmp_path)
