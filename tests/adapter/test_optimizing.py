"""φ's rate, decay, rest and smoothing outside this package's own trainer, and the warning where they do nothing."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from weakref import WeakKeyDictionary

import pytest
import torch
from peft import LoraConfig, get_peft_model

import basisadapt
from basisadapt import InputError, PhiConfig
from basisadapt.adapter import honored
from tests.conftest import randomise, tiny

SETTINGS = {"task_type": "SEQ_CLS", "r": 3, "num_basis": 6, "gain": 2.0, "backend": "direct"}
LABELS = torch.tensor([0, 1, 2, 0])


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny("bert").double(), PhiConfig(**{**SETTINGS, **settings})).double()
    randomise(model)
    return model


def bank_of(model, adapter="default"):
    return model.base_model.phi_bank[adapter]


def named(model, groups):
    """The groups with the names of their parameters."""
    names = {id(parameter): name.rpartition(".phi_bank.default.")[2] for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]


@pytest.mark.parametrize(("transfer_lr", "rate"), [(1.0, 1e-3), (20.0, 2e-2), (0.0, 0.0), ("absolute:0.03", 0.03)])
def test_param_groups_have_the_rates_and_decays_of_the_settings(transfer_lr, rate):
    model = adapted(transfer_lr=transfer_lr, transfer_decay=0.2, grid="learned", gain="learned:2")
    rest, amplitudes, others = named(model, basisadapt.param_groups(model, 1e-3, 0.1))
    assert (amplitudes["params"], amplitudes["lr"], amplitudes["weight_decay"]) == (["alpha"], rate, 0.2)
    assert sorted(others["params"]) == ["grid", "log_gain", "raw_omega"]
    assert (others["lr"], others["weight_decay"]) == (rate, 0.0)
    assert (rest["lr"], rest["weight_decay"]) == (1e-3, 0.1)
    tables = {*amplitudes["params"], *others["params"]}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".phi_bank." not in name}
    assert set(rest["params"]) == trained
    assert any("classifier" in name for name in trained)
    assert not tables & trained


def test_param_groups_leave_out_what_does_not_train():
    model = adapted(learn_omega=False)
    assert [len(group["params"]) for group in basisadapt.param_groups(model, 1e-3)][1:] == [1]
    bank_of(model).requires_grad_(False)
    assert len(basisadapt.param_groups(model, 1e-3)) == 1
    model.requires_grad_(False)
    assert basisadapt.param_groups(model, 1e-3) == []


def test_param_groups_of_other_models_are_one():
    for model in (tiny("bert"), get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))):
        (group,) = basisadapt.param_groups(model, 1e-3, 0.1)
        assert group["params"] == [p for p in model.parameters() if p.requires_grad]


def test_every_adapter_has_its_own_rate():
    model = adapted(task_type=None, transfer_lr=2.0)
    model.add_adapter("second", PhiConfig(**{**SETTINGS, "task_type": None, "transfer_lr": 5.0}))
    model.base_model.set_adapter(["default", "second"])
    rates = {name: group["lr"] for group in basisadapt.param_groups(model, 1e-3) for name in names_in(model, group)}
    assert rates["base_model.phi_bank.default.alpha"] == 2e-3
    assert rates["base_model.phi_bank.second.alpha"] == 5e-3


def names_in(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(
    "ask", [lambda m: basisadapt.param_groups(m, 1e-3), lambda m: basisadapt.before_step(m, 1, 10)]
)
def test_the_model_inside_is_refused(ask):
    with pytest.raises(InputError, match="give the peft model itself"):
        ask(adapted().get_base_model())


def gradients(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=LABELS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in bank_of(model).named_parameters()}


def test_phi_rests_for_its_share_of_the_steps(tokens):
    model = adapted(transfer_delay=0.3)
    for step in range(1, 11):
        before = gradients(model, tokens)
        basisadapt.before_step(model, step, 10)
        for name, table in bank_of(model).named_parameters():
            assert (table.grad is None) == (step <= 3), (step, name)
            assert table.grad is None or torch.equal(table.grad, before[name])


def test_smoothing_adds_its_gradient(tokens):
    """That of λ · mean φ''², by central differences of a mean that is written apart."""
    model = adapted(smoothing=0.05, transfer_delay=0.1, learn_omega=False)
    bank = bank_of(model)
    before = gradients(model, tokens)
    basisadapt.before_step(model, 1, 10)
    assert bank.alpha.grad is None
    before = gradients(model, tokens)
    basisadapt.before_step(model, 2, 10)
    added = bank.alpha.grad - before["alpha"]

    def roughness(alpha):
        """The mean of φ''² over x in [−I, I] and the modules, from differences at 8 N + 2 points."""
        omega, x = torch.log1p(bank.raw_omega.exp()), torch.linspace(-3, 3, 8 * 6 + 2, dtype=torch.float64)
        u = omega[:, None] * (x[:, None] - bank.grid[:, None])
        phi = (alpha[:, None] * torch.sinc(u)).sum(-1)
        second = (phi[:, 2:] - 2 * phi[:, 1:-1] + phi[:, :-2]) / (x[1] - x[0]) ** 2
        return second.square().mean()

    alpha, step = bank.alpha.detach().clone(), 1e-4
    for row, column in ((0, 0), (3, 2), (len(alpha) - 1, 5)):
        up, down = alpha.clone(), alpha.clone()
        up[row, column] += step
        down[row, column] -= step
        expected = 0.05 * (roughness(up) - roughness(down)) / (2 * step)
        assert added[row, column].item() == pytest.approx(expected.item(), rel=1e-6)


def train(model, tokens, optimizer, steps=4, before=lambda step: None):
    """A loop; returns what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=LABELS).loss.backward()
            before(step)
            optimizer.step()
    return [str(one.message) for one in caught if "this training ignores" in str(one.message)]


EVERYTHING = {"transfer_lr": 3.0, "transfer_decay": 0.1, "transfer_delay": 0.5, "smoothing": 0.01}


def test_what_nobody_honors_is_told_once(tokens):
    model = adapted(**EVERYTHING)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    (told,) = train(model, tokens, optimizer)
    assert "ignores transfer_lr and transfer_decay and transfer_delay and smoothing of" in told
    assert "basisadapt.param_groups(model, lr, weight_decay)" in told
    assert "basisadapt.PhiCallback()" in told
    assert train(model, tokens, optimizer) == []
    assert train(copy.deepcopy(model), tokens, optimizer) == []


def test_what_is_honored_is_not_told(tokens):
    model = adapted(**EVERYTHING)
    optimizer = torch.optim.AdamW(basisadapt.param_groups(model, 1e-3, 0.0))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-4), "the rate of the first step is not the settings'"
    assert train(model, tokens, optimizer, before=lambda step: basisadapt.before_step(model, step, 4)) == []


@pytest.mark.parametrize("preset", ["paper", "residual"])
def test_a_model_that_asks_for_nothing_is_not_looked_at(preset, tokens):
    model = adapted(preset=preset)
    assert train(model, tokens, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"transfer_lr": 0.0}, "transfer_lr"),
        ({"preset": "nyquist"}, "transfer_lr"),
        ({"transfer_decay": 0.1}, "transfer_decay"),
        ({"transfer_delay": 0.5}, "transfer_delay"),
        ({"smoothing": 0.1}, "smoothing"),
    ],
)
def test_each_setting_is_told_alone(settings, told, tokens):
    model = adapted(**settings)
    (message,) = train(model, tokens, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3))
    assert message.startswith(f"this training ignores {told} of the adapter's settings: ")
    steps = told in ("transfer_delay", "smoothing")
    assert ("before_step" in message, "param_groups" in message) == (steps, not steps)


def test_our_own_trainer_honors_them_by_the_same_function(tokens):
    from basisadapt.methods import METHODS

    phi, models = METHODS["phi"](), [adapted(**EVERYTHING) for _ in range(2)]
    settings = models[0].peft_config["default"]
    for step in (1, 3):
        for model in models:
            gradients(model, tokens)
        phi.before_step(models[0], settings, step, 4)
        basisadapt.before_step(models[1], step, 4)
        for ours, theirs in zip(*(bank_of(model).parameters() for model in models), strict=True):
            assert (ours.grad is None) == (theirs.grad is None) == (step == 1)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    optimizer = torch.optim.AdamW(basisadapt.param_groups(models[0], 1e-3))
    assert train(models[0], tokens, optimizer, before=lambda step: phi.before_step(models[0], settings, step, 4)) == []


def test_groups_made_by_hand_are_as_good(tokens):
    """It is looked at what the optimiser has, not at who made it."""
    model = adapted(transfer_lr=3.0, transfer_decay=0.1)
    tables = dict(bank_of(model).named_parameters())
    rest = [p for n, p in model.named_parameters() if p.requires_grad and ".phi_bank." not in n]
    groups = [
        {"params": [tables["raw_omega"]], "lr": 6e-3},
        {"params": rest},
        {"params": [tables["alpha"]], "lr": 6e-3, "weight_decay": 0.1},
    ]
    assert train(model, tokens, torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0)) == []


def test_an_optimiser_of_phi_alone_has_no_base_rate(tokens):
    model = adapted(transfer_lr=3.0)
    assert train(model, tokens, torch.optim.SGD(bank_of(model).parameters(), lr=0.1)) == []
    model = adapted(transfer_lr="absolute:0.2")
    assert len(train(model, tokens, torch.optim.SGD(bank_of(model).parameters(), lr=0.1))) == 1


def test_others_steps_are_looked_at_no_longer_than_needed(monkeypatch):
    from torch.optim import optimizer as of_torch

    # As in a new process: what other tests left is not looked at.
    monkeypatch.setattr(of_torch, "_global_optimizer_pre_hooks", OrderedDict())
    monkeypatch.setattr(honored, "_unseen", WeakKeyDictionary())
    monkeypatch.setattr(honored, "_handles", [])

    def hooks():
        return len(of_torch._global_optimizer_pre_hooks)

    def step(model):
        torch.optim.SGD(basisadapt.param_groups(model, 1e-3)).step()

    plain = adapted()
    assert hooks() == 0
    first, second = adapted(transfer_lr=2.0), adapted(transfer_lr=2.0)
    assert hooks() == 1
    step(plain)
    assert hooks() == 1
    step(first)
    assert hooks() == 1
    del second
    step(plain)
    assert hooks() == 0, "the other is gone"


def test_transformers_own_add_adapter_says_what_works_instead(bert, tokens):
    """φ's tables would be in no state_dict and train with no optimiser."""
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        bert.add_adapter(PhiConfig(**SETTINGS))
    model = get_peft_model(bert, PhiConfig(**SETTINGS))
    assert model(input_ids=tokens).logits.shape == (4, 3)
