"""φ(BA) on a GPU gives what it gives on the CPU: values, gradients, merging, saving, mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from basisadapt import PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi.basis import BASES
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Series
from tests.adapter.test_states import X, adapted, overwrite, own
from tests.conftest import randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LABELS = torch.tensor([0, 1, 2, 0])


def loss_and_gradients(model, tokens):
    device = next(model.parameters()).device
    output = model(input_ids=tokens.to(device), labels=LABELS.to(device))
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return output.logits.detach().cpu(), gradients


@pytest.mark.parametrize("basis", ["sinc", "bspline"])
@pytest.mark.parametrize("backend", ["auto", "direct"])
def test_as_on_the_cpu(basis, backend, bert, tokens, tmp_path):
    base = copy.deepcopy(bert)
    config = PhiConfig(task_type="SEQ_CLS", r=3, num_basis=10, gain=2.0, basis=basis, backend=backend, grid="random")
    model = get_peft_model(bert, config).eval()
    randomise(model)
    logits, gradients = loss_and_gradients(model, tokens)
    model.save_pretrained(tmp_path)

    moved = model.cuda()
    assert all(p.is_cuda for p in moved.state_dict().values())
    cuda_logits, cuda_gradients = loss_and_gradients(moved, tokens)
    torch.testing.assert_close(cuda_logits, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(cuda_gradients[name] / scale, gradient / scale, rtol=0, atol=1e-2, msg=name)

    loaded = PeftModel.from_pretrained(base.cuda(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens.cuda()).logits.cpu(), cuda_logits)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed = loaded(input_ids=tokens.cuda()).logits
        torch.testing.assert_close(mixed.float().cpu(), logits, rtol=0.1, atol=0.1)
        loaded.merge_adapter(safe_merge=True)
        torch.testing.assert_close(loaded(input_ids=tokens.cuda()).logits.cpu(), cuda_logits, rtol=0, atol=1e-5)


def test_training_is_repeatable(bert, tokens):
    def train():
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(bert).cuda(), PhiConfig(task_type="SEQ_CLS", r=3)).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(input_ids=tokens.cuda(), labels=LABELS.cuda()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = train()
    assert first == train()
    assert first[-1] < first[0]


GAINS = [30.0, "learned:30", "normalised:1"]
CALLS = {
    "the model": lambda model, **inputs: model(**inputs),
    "the inner model": lambda model, **inputs: model.base_model.model(**inputs),
    "checkpointing": lambda model, **inputs: model(**inputs),
}


def trained(base, dtype, settings, call, device, steps=20):
    """The losses of a training run, and the model."""
    torch.manual_seed(0)
    config = PhiConfig(task_type="SEQ_CLS", r=3, num_basis=10, grid="learned", **settings)
    model = get_peft_model(copy.deepcopy(base).to(dtype).to(device), config).eval()
    if call == "checkpointing":
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs = {"input_ids": TOKENS.to(device), "labels": LABELS.to(device)}
    losses = []
    for _ in range(steps):
        loss = CALLS[call](model, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), model


TOKENS = torch.randint(1, 60, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("basis", sorted(BASES))
def test_twenty_steps_are_those_of_the_cpu(basis, gain, call, bert):
    """Whoever calls the layers, whichever gain: a step over several tensors at once leaves their versions as they were,
    and functions that are older than the factors would show at the second step."""
    search = BASES[basis].search.get("omega_init")
    settings = {"basis": basis, "gain": gain, "omega_init": min(search.high, 2.0) if search else 1.0}
    if basis == "polynomial":
        settings["gain"] = {30.0: 3.0, "learned:30": "learned:3"}.get(gain, gain)
    found, model = trained(bert, torch.float32, settings, call, "cuda")
    expected, _ = trained(bert, torch.float32, settings, call, "cpu")
    assert found.isfinite().all()
    assert found[-1] < found[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert_as_direct(model)


@pytest.mark.parametrize("backend", ["triton", "torch", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("call", CALLS)
def test_every_backend_and_dtype_trains(backend, dtype, gain, call, bert):
    losses, model = trained(bert, dtype, {"gain": gain, "backend": backend}, call, "cuda")
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]
    assert_as_direct(model, 2e-4 if dtype == torch.bfloat16 else 2e-6)


@torch.no_grad()
def assert_as_direct(model, bound=2e-5):
    """ΔW of every layer against the direct sum in float64."""
    for layer in (module for module in model.modules() if isinstance(module, PhiLinear)):
        A, B = layer.phi_A["default"].double(), layer.phi_B["default"].double()
        expected = layer.phi_source["default"].transfer(layer.name).double()(B @ A)
        found = layer.get_delta_weight("default").double()
        assert (found - expected).abs().max() <= bound * expected.abs().max(), layer.name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("basis", "omega", "kind"), [("sinc", 1.0, Series), ("bspline", 3.0, Row)])
def test_no_function_is_continued_beyond_its_range(backend, basis, omega, kind):
    """Values overwritten between the forward and the backward pass end in NaN, not in large numbers."""
    model = adapted(basis=basis, omega_init=omega, gain=3.0, widths=(10, 250, 10), backend=backend).cuda()
    assert isinstance(model.base_model.model[0].phi_source["default"].fresh("0"), kind)
    loss = model(X.cuda()).sum()
    overwrite(model, 10.0)
    loss.backward()
    assert all(p.grad.isnan().any() for name, p in own(model).items() if "phi_A" in name)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_row_that_towers_leaves_the_others_right(backend, bert):
    model = get_peft_model(
        copy.deepcopy(bert).cuda(), PhiConfig(task_type="SEQ_CLS", r=3, num_basis=10, backend=backend)
    )
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phi_B" in name:
                parameter[5] *= 1e4
    for layer in (module for module in model.modules() if isinstance(module, PhiLinear)):
        A, B = layer.phi_A["default"].double(), layer.phi_B["default"].double()
        expected = layer.phi_source["default"].transfer(layer.name).double()(B @ A)
        off = (layer.get_delta_weight("default").double() - expected).abs().amax(1)
        others = torch.arange(len(off), device=off.device) != 5
        assert off[others].max() <= 1e-5 * expected[others].abs().max(), layer.name
    loss_and_gradients(model.eval(), TOKENS)


def test_a_loaded_state_is_seen_at_once(bert):
    """Narrow functions into a model that served wide ones: the merge and the next pass are right."""
    wide, narrow = (
        get_peft_model(
            copy.deepcopy(bert).cuda(),
            PhiConfig(task_type="SEQ_CLS", r=3, num_basis=4, basis="bspline", omega_init=omega, gain=30.0),
        ).eval()
        for omega in (1.0, 100.0)
    )
    randomise(narrow, scale=0.05)
    wide(input_ids=TOKENS.cuda(), labels=LABELS.cuda()).loss.backward()
    wide.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(
        wide(input_ids=TOKENS.cuda()).logits, narrow(input_ids=TOKENS.cuda()).logits, rtol=1e-4, atol=1e-5
    )
    assert_as_direct(wide, 1e-5)
