"""What of a model trains, and what of it moves."""

from __future__ import annotations

import torch
from peft import PeftModel

from tests.adapter.toys import CASES, X, adapted, answer, base, cases, parts, trainable


@cases
def test_only_params_are_updated(case):
    model = adapted(case).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        own = ".phi_A." in name or ".phi_B." in name or ".phi_bank." in name or "modules_to_save." in name
        assert torch.equal(parameter, before[name]) != own, name
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@cases
def test_parameters_after_loading_model(case, tmp_path):
    """What was trained is what is loaded, name by name, in float64 as everything here."""
    model = adapted(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(CASES[case][0]), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    found = loaded.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


@cases
def test_forward_output_finite(case):
    assert answer(adapted(case)).isfinite().all()
    assert answer(adapted(case, preset="paper", amplitude_init="normal:1")).isfinite().all()


@cases
def test_disable_adapters_after_training_nested_and_merged(case):
    expected = answer(base(CASES[case][0]))
    model = adapted(case)
    enabled = answer(model)
    assert not torch.equal(enabled, expected)
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
        with model.disable_adapter():
            assert torch.equal(answer(model), expected)
        assert torch.equal(answer(model), expected), "the inner context leaves the outer one as it was"
    assert torch.equal(answer(model), enabled)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
    torch.testing.assert_close(answer(model), enabled, rtol=1e-12, atol=1e-12)
    assert torch.equal(answer(model.unload()), expected)


def test_disabled_adapters_do_not_train():
    model = adapted()
    model.disable_adapter_layers()
    assert trainable(model) == set()
    model.enable_adapter_layers()
    assert trainable(model) == parts("default", "lin0")
