"""φ(BA) on a GPU gives what it gives on the CPU: values, gradients, merging, saving, mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from basisadapt import PhiConfig
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
