"""Right after whatever was done to a model: values and gradients against the formula in float64, written out here."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi import choice
from basisadapt.phi.cubic_tables import Spline
from basisadapt.phi.evaluators import Series, Split

X = torch.randn(9, 10, generator=torch.Generator().manual_seed(3))

BASES = {
    "sinc": lambda x, omega, grid: torch.sinc(omega * (x - grid)),
    "gaussian_rbf": lambda x, omega, grid: torch.exp(-((omega * (x - grid)) ** 2)),
    "bspline": lambda x, omega, grid: spline((omega * (x - grid)).abs()),
    "fourier": lambda x, omega, grid: torch.cos(omega * x + grid),
    "polynomial": lambda x, omega, grid: (1 + omega * x) ** 3,
    "sinusoid": lambda x, omega, grid: torch.sin(omega * x),
}


def spline(distance):
    inner, outer = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
    return torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0 * distance))


def update(settings, z, alpha, raw_omega, grid, gain):
    """ΔW by its formula: s (p z + (φ(g z) − c φ(0)) / g)."""
    omega = torch.logaddexp(raw_omega, torch.zeros_like(raw_omega))

    def phi(x):
        return (BASES[settings.basis](x.unsqueeze(-1), omega, grid) * alpha).sum(-1)

    centre = phi(torch.zeros((), dtype=z.dtype)) if settings.centre else 0.0
    return settings.lora_alpha / settings.r * (settings.identity_path * z + (phi(gain * z) - centre) / gain)


def gain_of(settings, bank, index, z):
    kind, number = settings.gain_form.kind, settings.gain_form.number
    if kind == "learned":
        return bank.log_gain[index].exp()
    return number / z.detach().square().mean().sqrt().clamp_min(1e-6) if kind == "normalised" else number


class Truth:
    """The same model in float64, its adapted layers by the formula; shaken: with every entry of A off by a unit in
    float32's last place, up or down, which tells what rounding BA does; 1, 2, ... are draws of up or down."""

    def __init__(self, model, shaken=False):
        self.twin = copy.deepcopy(model).double()
        self.inner, self.bank = self.twin.base_model.model, self.twin.base_model.phi_bank["default"]
        self.settings = self.twin.peft_config["default"]
        generator = torch.Generator().manual_seed(6 + shaken)
        for name in self.bank.rows:
            A = self.inner.get_submodule(name).phi_A["default"]
            up = torch.rand(A.shape, generator=generator) < 0.5
            A.data *= 1 + bool(shaken) * 2.0**-23 * (2.0 * up - 1)

    def update(self, name):
        layer, rows, index = self.inner.get_submodule(name), self.bank.rows[name], list(self.bank.rows).index(name)
        z = layer.phi_B["default"] @ layer.phi_A["default"]
        tables = self.bank.alpha[rows[0]], self.bank.raw_omega[rows[1]], self.bank.grid[rows[2]]
        return update(self.settings, z, *tables, gain_of(self.settings, self.bank, index, z))

    def layer(self, name, x):
        base = self.inner.get_submodule(name).base_layer
        return nn.functional.linear(x, base.weight + self.update(name), base.bias)

    def __call__(self, x):
        return self.layer("2", torch.tanh(self.layer("0", x)))

    def gradients(self):
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own(self.twin).items()}


def adapted(seed=0, widths=(10, 20, 4), **settings):
    torch.manual_seed(seed)
    given = {"r": 2, "num_basis": 5, "factor_init": "both", "amplitude_init": "normal:0.1", **settings}
    plain = nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))
    return get_peft_model(plain, PhiConfig(**given, target_modules=["0", "2"]))


def own(model):
    return {name: p for name, p in model.named_parameters() if "phi_" in name}


def off(found, expected, shaken=None):
    """The largest difference, relative to the largest value; less what rounding BA would do."""
    rounding = 0.0 if shaken is None else 4 * (shaken - expected).abs().max()
    difference = ((found.double() - expected).abs().max() - rounding).clamp_min(0.0)
    return (difference / expected.abs().max().clamp_min(1e-10)).item()


def assert_gradients(model, loss, bound=1e-5):
    """loss: of a `Truth`, what was minimised."""
    exact, shaken = (Truth(model, shaken) for shaken in (False, True))
    for one in (exact, shaken):
        loss(one).backward()
    moved = shaken.gradients()
    for name, expected in exact.gradients().items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None, name
        assert off(parameter.grad, expected, moved[name]) <= bound, name


def squares(call):
    return call(X.double()).square().sum()


@torch.no_grad()
def assert_values(model, found, bound=2e-6):
    assert off(found, *(Truth(model, shaken)(X.double()) for shaken in (False, True))) <= bound


@torch.no_grad()
def assert_weights(model, bound=2e-6):
    exact, shaken = Truth(model), Truth(model, shaken=True)
    for name in exact.bank.rows:
        found = model.base_model.model.get_submodule(name).get_delta_weight("default")
        assert off(found, exact.update(name), shaken.update(name)) <= bound, name


def assert_right(model, call=None, bound=1e-5):
    """Values and gradients of a call of the model, and ΔW, as the formula has them."""
    model.zero_grad()
    found = (call or model)(X)
    assert_values(model, found)
    found.square().sum().backward()
    assert_gradients(model, squares, bound)
    assert_weights(model)


@torch.no_grad()
def overwrite(model, factor=3.0):
    """As an average of the weights does when it is swapped in: no version of a tensor changes."""
    for parameter in own(model).values():
        parameter.data.copy_(factor * parameter.data)


# ---- nothing is older than the parameters


def test_what_leaves_the_model_is_of_this_moment():
    model = adapted()
    model(X)
    with torch.no_grad():
        model(X)
    overwrite(model, 30.0)
    assert_weights(model)
    assert_values(model, copy.deepcopy(model).merge_and_unload()(X))


@pytest.mark.parametrize("factor", [0.5, 3.0, 30.0])
def test_the_inner_model_and_its_layers_notice_what_was_written_past_autograd(factor):
    model = adapted()
    inner = model.base_model.model
    inner(X)
    overwrite(model, factor)
    assert_right(model, inner)
    inner[0](X)
    overwrite(model, 1.5)
    assert_right(model, lambda x: inner[2](torch.tanh(inner[0](x))))


@pytest.mark.parametrize("gain", [30.0, "learned:30", "normalised:1"])
def test_fused_steps_of_an_optimiser_are_noticed(gain):
    """They, and on a GPU all steps over several tensors at once, leave the tensors' versions as they were."""
    model = adapted(gain=gain, factor_init="lora", amplitude_init="zero").eval()
    optimizer = torch.optim.AdamW(own(model).values(), lr=1e-2, fused=True)
    for _ in range(4):
        found = model.base_model.model(X)
        assert_values(model, found)
        found.square().sum().backward()
        assert_gradients(model, squares)
        optimizer.step()
        optimizer.zero_grad()


def test_a_function_is_not_continued_beyond_its_range():
    """Values that were overwritten between the forward and the backward pass end in NaN, not in large numbers."""
    for basis, omega, kind in (("sinc", 1.0, Series), ("bspline", 3.0, Spline)):
        model = adapted(basis=basis, omega_init=omega, gain=3.0, widths=(10, 250, 10))
        assert isinstance(model.base_model.model[0].phi_source["default"].fresh("0"), kind)
        loss = model(X).sum()
        overwrite(model, 10.0)
        loss.backward()
        assert all(p.grad.isnan().any() for name, p in own(model).items() if "phi_A" in name)


# ---- gradients


@pytest.mark.parametrize("sharing", ["none", "all"])
@pytest.mark.parametrize(
    "settings", [{}, {"gain": "learned:30"}, {"backend": "direct"}, {"basis": "bspline", "omega_init": 4.0}]
)
def test_a_layer_without_gradients_before_one_with_them(sharing, settings):
    model = adapted(sharing=sharing, grid="learned", **settings)
    inner = model.base_model.model
    first, second = inner[0], inner[2]

    def forward(x):
        with torch.no_grad():
            hidden = first(x)
        return second(torch.tanh(hidden))

    inner.forward = forward
    model(X).square().sum().backward()
    exact = Truth(model)
    exact.layer("2", torch.tanh(exact.layer("0", X.double()).detach())).square().sum().backward()
    expected = exact.gradients()
    for name in expected:
        if "phi_bank" in name:
            assert off(model.get_parameter(name).grad, expected[name]) <= 1e-5, name


def test_tables_that_begin_to_train_are_noticed():
    model = adapted()
    inner, bank = model.base_model.model, model.base_model.phi_bank["default"]
    bank.requires_grad_(False)
    inner(X)
    bank.requires_grad_(True)
    assert_right(model, inner)


FORMS = [
    {"gain": gain, "backend": backend, "basis": basis, "omega_init": omega, "grid": "learned"}
    for gain in (3.0, "learned:3", "normalised:1")
    for backend, basis, omega in (("auto", "sinc", 1.0), ("direct", "sinc", 1.0), ("auto", "bspline", 4.0))
]


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: f"{s['gain']}, {s['backend']}, {s['basis']}")
def test_one_compilation_serves_many_backward_passes(settings):
    model = adapted(widths=(10, 250, 4), **settings)
    inner = model.base_model.model
    for _ in range(2):
        inner(X).square().sum().backward()
    assert_gradients(model, lambda exact: 2 * squares(exact))
    for reentrant in (True, False):
        model.zero_grad()
        x = X.clone().requires_grad_()
        hidden = checkpoint(inner[0], x, use_reentrant=reentrant)
        checkpoint(inner[2], torch.tanh(hidden), use_reentrant=reentrant).square().sum().backward()
        assert_gradients(model, squares)


@pytest.mark.parametrize("settings", FORMS[3:6], ids=lambda s: f"{s['gain']}, {s['backend']}, {s['basis']}")
def test_threads_may_train_one_model(settings):
    model, failures = adapted(widths=(10, 250, 4), **settings), []
    barrier = threading.Barrier(3)

    def work():
        try:
            for call in (model, model.base_model.model):
                barrier.wait()
                call(X).square().sum().backward()
        except Exception as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_gradients(model, lambda exact: 6 * squares(exact))


def test_at_b_zero_phi_gets_no_gradient_at_all():
    """Adam would make a whole step of the smallest one: the first step is LoRA's."""
    for settings in ({}, {"gain": "learned:30"}, {"basis": "bspline"}, {"basis": "fourier", "omega_init": 5.0}):
        model = adapted(factor_init="lora", amplitude_init="zero", widths=(64, 96, 80), grid="learned", **settings)
        model(torch.randn(50, 64)).square().sum().backward()
        for name, parameter in own(model).items():
            if "phi_bank" in name:
                assert parameter.grad.abs().max() <= 1e-11, name
            if "phi_B" in name:
                assert parameter.grad.abs().max() > 1e-3, name


# ---- inputs and dtypes


@pytest.mark.parametrize("basis", ["fourier", "sinusoid", "polynomial"])
def test_at_b_zero_a_bandwidth_gets_no_gradient_that_rounding_made(basis):
    """∂F/∂ω = z φ'(z) is zero at zero; without centring F(0) has gradients to α, and of a series 2e-7 to ω."""
    model = adapted(basis=basis, centre=False, factor_init="lora", omega_init=67.0, num_basis=4)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    (100 * model.base_model.model(x)).sum().backward()
    bank = model.base_model.phi_bank["default"]
    assert bank.raw_omega.grad.abs().max() < 1e-12
    if basis != "sinusoid":  # whose sine is zero there
        assert bank.alpha.grad.abs().max() > 1
    assert_gradients(model, lambda truth: (100 * truth(x.double())).sum())


def test_an_input_of_one_dimension():
    model = adapted()
    x, exact = X[0].clone().requires_grad_(), X[0].double().requires_grad_()
    y = model(x)
    assert y.shape == (4,)
    y.square().sum().backward()
    assert_gradients(model, lambda truth: truth(exact).square().sum())
    assert off(x.grad, exact.grad / 2) <= 1e-5  # of two passes, one of them shaken
    assert model(X[:0]).shape == (0, 4)


def test_the_tolerance_follows_each_layers_weight():
    model = adapted(num_basis=9, gain=9.0)
    model.base_model.model[0].base_layer.double()
    model.base_model.model[0].phi_A.double(), model.base_model.model[0].phi_B.double()
    model.base_model.phi_bank.double()
    inner = model.base_model.model

    def forward(x):
        return inner[2](torch.tanh(inner[0](x.double())).float())

    forward(X).square().sum().backward()
    assert_gradients(model, squares)
    assert off(inner[0].get_delta_weight("default"), Truth(model).update("0").detach()) <= 1e-11


def test_the_tolerance_follows_a_conversion():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)).bfloat16()
    config = PhiConfig(
        r=2, num_basis=9, gain=9.0, target_modules=["0", "2"], factor_init="both", amplitude_init="normal:1"
    )
    model = get_peft_model(plain, config)
    model(X.bfloat16())
    model.float()
    assert_right(model)


def test_replicas_of_dataparallel_are_refused():
    layer = adapted().base_model.model[0]
    with pytest.raises(InputError, match=r"nn\.DataParallel, .*DistributedDataParallel"):
        layer._replicate_for_data_parallel()(X)


# ---- the promise


def grown(model, name="0", row=3, factor=1e4):
    with torch.no_grad():
        model.base_model.model.get_submodule(name).phi_B["default"][row] *= factor
    return model


@pytest.mark.parametrize("basis", ["sinc", "gaussian_rbf", "bspline"])
def test_one_row_that_towers_leaves_the_others_right(basis):
    model = grown(adapted(basis=basis, identity_path=False, gain=1.0, num_basis=20))
    exact, layer = Truth(model), model.base_model.model[0]
    found, expected = layer.get_delta_weight("default"), exact.update("0").detach()
    shaken = Truth(model, shaken=True).update("0").detach()
    others = torch.arange(len(found)) != 3
    assert off(found[others], expected[others], shaken[others]) <= 2e-6
    assert off(found[~others], expected[~others], shaken[~others]) <= 2e-6
    assert isinstance(layer.phi_source["default"].fresh("0"), Split)
    y = layer(X)
    y[:, others].square().sum().backward()
    exact.layer("0", X.double())[:, others].square().sum().backward()
    for name in ("alpha", "raw_omega"):
        full = f"base_model.phi_bank.default.{name}"
        assert off(model.get_parameter(full).grad, exact.gradients()[full]) <= 1e-4, name


def test_a_bound_by_norms_that_is_far_off_is_not_used():
    """The large row of B and the large column of A are orthogonal."""
    model = adapted(basis="polynomial", identity_path=False, gain=1.0, widths=(10, 20, 4))
    with torch.no_grad():
        for index in (0, 2):
            layer = model.base_model.model[index]
            layer.phi_A["default"][0, 0], layer.phi_A["default"][1, 0] = 30.0, 0.0
            layer.phi_B["default"][:, 0] *= 1e-3
            layer.phi_B["default"][1] = torch.tensor([0.0, 30.0])
            layer.phi_A["default"][1] *= 1e-2
    assert_weights(model)


def test_a_loaded_state_with_narrow_functions_is_seen():
    narrow = adapted(basis="bspline", num_basis=4, omega_init=100.0, gain=30.0)
    model = adapted(basis="bspline", num_basis=4, omega_init=1.0, gain=30.0, seed=1)
    model(X)
    model.load_state_dict(narrow.state_dict())
    assert_right(model)


def test_one_narrow_function_among_wide_ones_is_seen():
    model = adapted(basis="gaussian_rbf", num_basis=200, gain=30.0, omega_init=1.0)
    model(X)
    with torch.no_grad():
        model.base_model.phi_bank["default"].raw_omega[:, 101] = 400.0
        model.base_model.phi_bank["default"].alpha[:, 101] = 1.0
    assert_right(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "sinusoid", "omega_init": 1000.0, "gain": 30.0, "num_basis": 8},
        {"basis": "bspline", "omega_init": "nyquist", "gain": 300.0, "num_basis": 512},
        {"basis": "sinc", "omega_init": "nyquist", "gain": 300.0, "num_basis": 50},
    ],
    ids=lambda s: s["basis"],
)
def test_a_table_is_judged_by_the_functions_and_not_by_their_sum(settings):
    """At α = 0 the sum is BA; the gradient to α is right all the same, as far as rounding BA lets it be."""
    assert_right(adapted(amplitude_init="zero", **settings))


def test_direct_evaluation_is_the_reference():
    """φ(g z) − φ(0) cancels, in float32 to nothing."""
    settings = {"amplitude_init": "identity", "identity_path": False, "gain": 1.0, "num_basis": 50, "backend": "direct"}
    model = adapted(**settings)
    with torch.no_grad():
        for index in (0, 2):
            layer = model.base_model.model[index]
            layer.phi_B["default"] *= 1e-3 / (layer.phi_B["default"] @ layer.phi_A["default"]).abs().max()
    assert_weights(model)


# ---- where the host does not wait: the choice of a GPU, on the CPU


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(choice, "deferred", lambda tensor: True)
    monkeypatch.setattr(choice, "_send", lambda numbers: (numbers.clone(), choice._arrived))


def test_merges_wait_for_the_choice(deferred):
    narrow = adapted(basis="bspline", num_basis=4, omega_init=100.0, gain=30.0)
    model = adapted(basis="bspline", num_basis=4, omega_init=1.0, gain=3.0, seed=1)
    model(X).sum().backward()
    model.load_state_dict(narrow.state_dict())
    assert_weights(model)
    assert_values(model, copy.deepcopy(model).merge_and_unload()(X))


def test_a_training_step_is_late_by_one_and_an_evaluation_is_not(deferred):
    model = adapted(basis="gaussian_rbf", gain=3.0)
    source = model.base_model.model[0].phi_source["default"]
    model(X).sum().backward()
    assert isinstance(source.fresh("0"), Series)
    overwrite_omega(model)
    with pytest.raises(AssertionError):
        assert_values(model, model(X))
    assert_values(model, model(X))
    overwrite_omega(model)
    with torch.no_grad():
        assert_values(model, model(X))


@torch.no_grad()
def overwrite_omega(model):
    bank = model.base_model.phi_bank["default"]
    bank.alpha.data.add_(0.5)
    bank.raw_omega.data.mul_(40.0)


def test_layers_of_the_model_are_ours():
    """What these tests rest on."""
    assert all(isinstance(adapted().base_model.model[index], PhiLinear) for index in (0, 2))


@pytest.mark.parametrize("settings", [{}, {"backend": "direct"}, {"gain": 300.0, "omega_init": 3.0}])
def test_a_model_that_nobody_holds_is_gone(settings):
    """Its frozen weights too: several layers' functions hang on one node of autograd, which may be in no cycle."""
    layers = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model = get_peft_model(layers, PhiConfig(r=2, target_modules=["0", "1"], **settings))
    model(X).sum().backward()
    with torch.no_grad():
        model.base_model.model[0].phi_A["default"].add_(0.1)
        model(X)
    del layers
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)
