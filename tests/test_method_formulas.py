"""Each of our methods against an independent plain formula, and what each is for."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch.nn import functional as F

from basisadapt import InputError, PhiConfig
from basisadapt.diagnostics.spectrum import singular_values, stable_rank
from basisadapt.methods import METHODS
from basisadapt.training.observation import adapted_layers
from tests.conftest import tiny


def layer_of(name, at="0.output.dense", **settings):
    """The method's first layer in a tiny model in float64 whose name ends so, with drawn parameters; the first there is
    has m = 32 and n = 48."""
    torch.manual_seed(0)
    method = METHODS[name]()
    model = method.attach(tiny("bert").double(), METHODS[name].settings(r=4, **settings), "SEQ_CLS").eval()
    layer = next(layer for found, layer in adapted_layers(model) if found.endswith(at))
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model, layer


def test_sinelora(tokens):
    model, layer = layer_of("sinelora", lora_alpha=8.0, frequency=50.0)
    A, B, x = layer.phi_A["default"], layer.phi_B["default"], torch.randn(5, 48, dtype=torch.float64)
    delta = 2 * torch.sin(50 * B @ A) / math.sqrt(48)
    # φ's tables, and so 1 / √n, are float32.
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-7, atol=0)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-6, atol=0)
    upstream = torch.randn(5, 32, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), (A, B), upstream)
    torch.testing.assert_close(
        found, torch.autograd.grad(F.linear(x, 2 * torch.sin(50 * B @ A) / math.sqrt(48)), (A, B), upstream)
    )
    assert not [name for name, p in model.named_parameters() if "phi_bank" in name], "the sine has nothing to learn"


def test_amplitudes_of_the_fan_in_are_not_shared_by_unlike_modules(bert):
    config = PhiConfig(amplitude_init="fan_in", sharing="all", task_type="SEQ_CLS")
    with pytest.raises(InputError, match="equal in_features"):
        peft.get_peft_model(bert, config)


def test_sinelora_has_a_higher_stable_rank_than_lora_on_the_same_factors():
    torch.manual_seed(0)
    A, B = torch.randn(4, 48, dtype=torch.float64) / 30, torch.randn(32, 4, dtype=torch.float64) / 2
    ranks = {}
    for name, owner, factors in (("lora", "weight", "lora_"), ("sinelora", None, "phi_")):
        layer = layer_of(name)[1]
        with torch.no_grad():
            for letter, value in (("A", A), ("B", B)):
                factor = getattr(layer, f"{factors}{letter}")["default"]
                (factor if owner is None else getattr(factor, owner)).copy_(value)
        ranks[name] = stable_rank(singular_values(METHODS[name]().weight_change(layer).detach()))
    assert ranks["lora"] < 4
    assert ranks["sinelora"] > 1.5 * ranks["lora"], "sin of a wide argument is of full rank"
    assert ranks["lora"] == pytest.approx(
        (torch.linalg.matrix_norm(B @ A).square() / torch.linalg.matrix_norm(B @ A, 2).square()).item()
    )


def parts(layer, prefix, names):
    return [getattr(layer, f"{prefix}_{name}")["default"] for name in names]


def check(layer, x, delta):
    """The layer is x (W + ΔW)ᵀ + b, and ΔW is what it says."""
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias))
    torch.testing.assert_close(layer.get_delta_weight("default"), delta.detach())


@pytest.fixture
def x():
    return torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_nola(x):
    """The frozen matrices one by one, and that they follow from seed and name alone."""
    _, layer = layer_of("nola", num_random=5, basis_seed=3, lora_alpha=12.0)
    a, b = parts(layer, "nola", "ab")
    A0, *U = layer.frozen_A["default"].double()
    V = layer.frozen_B["default"].double()
    assert (A0.shape, len(U), V.shape) == ((4, 48), 5, (5, 32, 4))
    A = A0 + sum(a[k] * U[k] for k in range(5)) / math.sqrt(5)
    B = sum(b[k] * V[k] for k in range(5)) / math.sqrt(5)
    check(layer, x, 3 * B @ A)
    assert A0.abs().max() <= 48**-0.5
    for drawn in (torch.stack(U), V):  # uniform on ±1
        assert drawn.abs().max() <= 1
        assert drawn.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    for settings, same in (({"basis_seed": 3}, True), ({"basis_seed": 4}, False)):
        again = layer_of("nola", num_random=5, **settings)[1]
        assert torch.equal(again.frozen_B["default"], layer.frozen_B["default"]) == same


def test_nola_saves_its_coefficients_alone(tmp_path):
    from safetensors.torch import load_file

    model, _ = layer_of("nola", num_random=5)
    model.save_pretrained(tmp_path)
    saved = {name: tensor.shape for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {tuple(shape) for name, shape in saved.items() if "classifier" not in name} == {(5,)}


def test_abba(x):
    _, layer = layer_of("abba", lora_alpha=2.0)
    A1, B1, A2, B2 = parts(layer, "abba", ("A1", "B1", "A2", "B2"))
    delta = torch.einsum("ia,aj,ib,bj->ij", B1, A1, B2, A2) / 2
    torch.testing.assert_close(delta, 0.5 * (B1 @ A1) * (B2 @ A2))
    check(layer, x, delta)
    assert torch.linalg.matrix_rank(delta) == 4, "the square of 4 / 2"


def test_abba_starts_at_the_singular_vectors_of_w():
    model = METHODS["abba"]().attach(tiny("bert").double(), METHODS["abba"].settings(r=4), "SEQ_CLS")
    for _, layer in adapted_layers(model):
        A1, B1, _, B2 = parts(layer, "abba", ("A1", "B1", "A2", "B2"))
        W = layer.base_layer.weight
        left = torch.linalg.matrix_norm(W - B1 @ A1, 2)
        torch.testing.assert_close(left, torch.linalg.svdvals(W)[2], rtol=1e-5, atol=0)  # Eckart and Young
        assert not B2.any()


def test_pissas_change_begins_at_nothing(x):
    """And is the product less that of the leading singular triplets of W, which lie in the base no more."""
    torch.manual_seed(0)
    W = tiny("bert").get_submodule("bert.encoder.layer.0.output.dense").weight.detach()
    model = METHODS["pissa"]().attach(tiny("bert"), METHODS["pissa"].settings(r=4, lora_alpha=8.0), "SEQ_CLS")
    layer = dict(adapted_layers(model))["bert.encoder.layer.0.output.dense"]
    method = METHODS["pissa"]()
    assert not method.weight_change(layer).any()
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.copy_(torch.randn_like(factor["default"].weight))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = 2 * B @ A - U[:, :4] * sigma[:4] @ Vt[:4]
    torch.testing.assert_close(method.weight_change(layer), expected, rtol=1e-5, atol=1e-5)


def test_dylora(x):
    _, layer = layer_of("dylora", lora_alpha=8.0)
    A, B = parts(layer, "dylora", "AB")
    check(layer, x, 2 * B @ A)
    layer.train()
    prefixes = {b: layer.base_layer(x) + x @ (8 / b * B[:, :b] @ A[:b]).T for b in range(1, 5)}
    seen = set()
    for _ in range(60):
        y = layer(x)
        (b,) = (b for b, expected in prefixes.items() if torch.allclose(y, expected, rtol=1e-10))
        seen.add(b)
    assert seen == {1, 2, 3, 4}
    torch.manual_seed(7)
    first = layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    torch.testing.assert_close(layer.get_delta_weight("default"), (2 * B @ A).detach())


def fit(name, steps=400):
    """The layer of a method trained to add a matrix of rank 4 with singular values 4, 3, 2, 1; and that matrix."""
    torch.manual_seed(1)
    layer = layer_of(name)[1].train()
    U, V = (torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64))[0] for size in (32, 48))
    target = U @ torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)) @ V.T
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        x = torch.randn(64, 48, dtype=torch.float64)
        loss = (layer(x) - layer.base_layer(x) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.eval(), target


def test_every_prefix_of_dylora_is_usable_after_training():
    """Any first b ranks are nearer to the target than nothing is, and nearer the more of them there are."""
    layer, target = fit("dylora")
    A, B = parts(layer, "dylora", "AB")
    errors = [torch.linalg.matrix_norm(4 / b * B[:, :b] @ A[:b] - target).item() for b in range(1, 5)]
    nothing = torch.linalg.matrix_norm(target).item()
    assert all(error < 0.9 * nothing for error in errors)
    assert errors == sorted(errors, reverse=True)


def test_elalora(x):
    _, layer = layer_of("elalora", lora_alpha=8.0)
    A, B, E = parts(layer, "elalora", "ABE")
    assert E.shape == (6,)
    check(layer, x, 2 * B @ torch.diag(E) @ A)


@pytest.mark.parametrize(("name", "sides"), [("0.output.dense", (32, 48)), ("0.intermediate.dense", (48, 32))])
def test_kradapter(name, sides):
    """Row by row, for a weight that is wide and one that is tall; 48 entries of 6 × 8 functions."""
    _, layer = layer_of("kradapter", at=name, lora_alpha=12.0)
    U, V = parts(layer, "kradapter", "UV")
    assert (layer.out_features, layer.in_features, U.shape, V.shape) == (*sides, (32, 6), (32, 8))
    K = torch.stack([torch.outer(u, v).reshape(-1) for u, v in zip(U, V, strict=True)])
    delta = 3 * (K if sides == (32, 48) else K.T)
    check(layer, torch.randn(5, sides[1], dtype=torch.float64), delta)
    assert torch.linalg.matrix_rank(delta) == 32, "of full rank"


def test_kradapter_cuts_what_is_too_long():
    """A square weight of 32: five times seven functions are 35, of which three are left out."""
    _, layer = layer_of("kradapter", at="attention.self.query")
    U, V = parts(layer, "kradapter", "UV")
    assert (U.shape, V.shape) == ((32, 5), (32, 7))
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta[3], torch.outer(U[3], V[3]).reshape(-1)[:32])
    assert U.numel() + V.numel() == 32 * (5 + 7)


def test_aurora(x):
    _, layer = layer_of("aurora", lora_alpha=8.0, num_knots=7)
    A, B, W, c = parts(layer, "aurora", ("A", "B", "W", "spline"))

    def b3(u):
        """The cubic B-spline, piece by piece."""
        u = abs(u)
        return 2 / 3 - u**2 + u**3 / 2 if u < 1 else (2 - u) ** 3 / 6 if u < 2 else 0.0

    z = x @ A.T
    spline = [[sum(c[j, k] * b3(z[i, j].item() - (k - 3)) for k in range(7)) for j in range(4)] for i in range(5)]
    anl = torch.tanh(torch.tanh(z) @ W.T) + torch.tensor(spline, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * anl @ B.T)


@pytest.mark.parametrize("name", ["adalora", "elalora"])
def test_ranks_move_to_the_layer_that_needs_them(name):
    """The loss asks one module for a change of rank 6 and the others, hardly, for a change of rank 1."""
    torch.manual_seed(0)
    method, settings = METHODS[name](), METHODS[name].settings(r=2, spare=2.0, settle=0.1)
    model = method.attach(tiny("bert").double(), settings, "SEQ_CLS").train()
    layers = dict(adapted_layers(model))
    needy = "bert.encoder.layer.1.attention.self.value"

    def wanted(module, layer):
        rank, size = (6, 3.0) if module == needy else (1, 0.01)
        U, V = (
            torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0]
            for n in (layer.out_features, layer.in_features)
        )
        return size * U @ V.T

    targets = {module: wanted(module, layer) for module, layer in layers.items()}
    optimiser = torch.optim.Adam([p for n, p in model.named_parameters() if "lora_" in n], lr=0.02)
    total = 150
    for step in range(1, total + 1):
        loss = 0.0
        for module, layer in layers.items():
            x = torch.randn(32, layer.in_features, dtype=torch.float64)
            loss = loss + (layer(x) - layer.base_layer(x) - x @ targets[module].T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(model, settings, step, total)
    ranks = {
        module: int(torch.linalg.matrix_rank(method.weight_change(layer), rtol=1e-8))
        for module, layer in layers.items()
    }
    others = [rank for module, rank in ranks.items() if module != needy]
    assert ranks[needy] == max(ranks.values()) >= 5, "of 6 that it has room for; the average is 2"
    assert sum(others) / len(others) < 2
    assert sum(ranks.values()) <= 2 * len(layers), "r on average"
