"""A recorded compilation gives what a plain one gives, bit for bit: as graphs, or by tapes where there is no GPU."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from basisadapt import PhiConfig
from basisadapt.core.errors import InputError
from basisadapt.phi import choice, recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)


class Tape(TorchDispatchMode):
    """All operators of some work, to be repeated into the memory of the first time, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def repeat(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_iter(made), tree_iter(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """As `recorded.Graphs`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, work: Any) -> Any:
        tape = Tape()
        self.tapes.append(tape)
        with tape:
            return work()

    @torch.no_grad()
    def repeat(self, index: int) -> None:
        self.tapes[index].repeat()


@pytest.fixture
def graphs(monkeypatch):
    """What is recorded, each with a `count` of repetitions; without a GPU on tapes, with the choice of a GPU."""
    made = []

    class Counted(recorded.Graphs if DEVICE.type == "cuda" else Tapes):
        count = 0

        def repeat(self, index: int) -> None:
            self.count += 1
            super().repeat(index)

    def new():
        made.append(Counted())
        return made[-1]

    if DEVICE.type == "cpu":
        monkeypatch.setattr(choice, "deferred", lambda tensor: True)
        monkeypatch.setattr(choice, "_send", lambda numbers: (numbers.clone(), choice._arrived))
    monkeypatch.setattr(choice, "Graphs", new)
    monkeypatch.setattr(choice, "RECORD_AFTER", 3)
    monkeypatch.setattr(choice, "_most", lambda work, index: 1 << 16)  # a table, where a direct sum would be cheaper
    return made


def model_of(**settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    config = PhiConfig(**{"r": 2, "num_basis": 8, "target_modules": ["0", "2", "4"], **settings})
    model = get_peft_model(layers, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "phi_B" in name or name.endswith("alpha"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(DEVICE)


def trained(model, steps, between=lambda model, step: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        loss = model(X).square().mean()
        loss.backward()
        losses.append((loss.item(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)))
        optimizer.step()
        optimizer.zero_grad()
        between(model, step)
    return losses


def equal(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a[0] == b[0], step
        assert all(map(torch.equal, a[1:], b[1:])), step


SETTINGS = {
    "series": {},
    "learned gain": {"gain": "learned:3", "grid": "learned"},
    "normalised gain": {"gain": "normalised:1", "grid": "learned"},
    "shared": {"sharing": "all"},
    "frozen omega": {"learn_omega": False},
    "tables": {"gain": 300.0, "omega_init": "nyquist", "num_basis": 16},
    "splines": {"basis": "bspline", "gain": 30.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_a_plain_compilation(name, graphs, monkeypatch):
    ours = trained(model_of(**SETTINGS[name]), 40)
    assert sum(one.count for one in graphs) > 20
    monkeypatch.setattr(choice, "RECORD_AFTER", math.inf)
    equal(ours, trained(model_of(**SETTINGS[name]), 40))


def look_without_gradients(model, step):
    with torch.no_grad():
        model(X)


def two_passes_before_one_backward(model, step):
    first, second = model(X).sum(), model(2 * X).sum()
    (first + second).backward()
    model.zero_grad()


def a_pass_without_backward(model, step):
    model(X)


def accumulate(model, step):
    for scale in (1, 2, 3):
        model(scale * X).sum().backward()
    model.zero_grad()


def backward_late(model, step):
    """The numbers of a pass must stay until its backward pass, whatever has been compiled since."""
    loss = model(X).sum()
    with torch.no_grad():
        bank = model.base_model.phi_bank["default"]
        bank.alpha.data.add_(1e-4)
        between = model(X).sum()
        bank.alpha.data.sub_(1e-4)
    with torch.no_grad():
        model(2 * X)
    later = model(X).sum()
    assert between != loss
    later.backward()
    loss.backward()
    model.zero_grad()


def load(model, step):
    if step == 20:
        state = {name: 1.01 * value for name, value in model.state_dict().items()}
        model.load_state_dict(state)


def assign(model, step):
    if step in (9, 20):
        for name, p in model.named_parameters():
            if p.requires_grad and "phi_A" in name:
                p.data = p.data.clone() * 1.01


def freeze(model, step):
    for name, p in model.named_parameters():
        if name.endswith("raw_omega"):
            p.requires_grad_(step % 12 < 6)


def merge(model, step):
    if step % 7 == 3:
        model.merge_adapter()
        model(X)
        model.unmerge_adapter()


def jump(model, step):
    """A range that leaves what was inspected: read one step late, then inspected."""
    if step in (10, 21):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "phi_B" in name:
                    p.mul_(1.6)


HISTORIES = [look_without_gradients, two_passes_before_one_backward, a_pass_without_backward, accumulate, backward_late]
HISTORIES += [load, assign, freeze, merge, jump]


@pytest.mark.parametrize("name", ["series", "tables"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda f: f.__name__)
def test_histories(history, name, graphs, monkeypatch):
    settings = SETTINGS[name]
    ours = trained(model_of(**settings), 36, history)
    assert sum(one.count for one in graphs) > 5
    monkeypatch.setattr(choice, "RECORD_AFTER", math.inf)
    equal(ours, trained(model_of(**settings), 36, history))


def test_a_second_backward_pass_of_an_old_pass_is_refused(graphs):
    model = model_of()
    trained(model, 10)
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    model(X).sum().backward()
    with pytest.raises(InputError, match="φ has changed since the forward pass"):
        loss.backward()


def test_a_copy_has_no_recording(graphs):
    model = model_of()
    trained(model, 10)
    copied = copy.deepcopy(model)
    equal(trained(copied, 10), trained(model, 10))
