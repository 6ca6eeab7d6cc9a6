"""The ways a model may be trained: checkpointing, accumulation, compilation, quantised weights."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from peft import get_peft_model

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi.compiler import Compiled, Compiler
from tests.conftest import randomise

LABELS = torch.tensor([0, 1, 2, 0])


def adapted(base, **settings):
    torch.manual_seed(0)
    config = PhiConfig(task_type="SEQ_CLS", r=3, num_basis=10, gain=2.0, **settings)
    model = get_peft_model(copy.deepcopy(base), config)
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def backward(model, tokens, rows=slice(None)):
    model(input_ids=tokens[rows], labels=LABELS[rows]).loss.backward()


@pytest.fixture
def expected(bert, tokens):
    model = adapted(bert)
    backward(model, tokens)
    return gradients(model)


def assert_close(found, truth):
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(reentrant, bert, tokens, expected):
    model = adapted(bert)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    backward(model, tokens)
    assert_close(gradients(model), expected)


def test_gradient_accumulation(bert, tokens, expected):
    model = adapted(bert)
    for rows in (slice(0, 2), slice(2, 4)):
        backward(model, tokens, rows)
    assert_close({name: g / 2 for name, g in gradients(model).items()}, expected)


def test_two_forward_passes_then_two_backward_passes(bert, tokens, expected):
    model = adapted(bert)
    losses = [model(input_ids=tokens[rows], labels=LABELS[rows]).loss for rows in (slice(0, 2), slice(2, 4))]
    for loss in losses:
        loss.backward()
    assert_close({name: g / 2 for name, g in gradients(model).items()}, expected)


def test_a_part_of_the_model_called_alone_follows_every_update(bert, tokens):
    """No pass through the whole model tells φ that A, B or its tables have changed."""
    model = adapted(bert)
    encoder = model.base_model.model.bert
    for parameter in ("phi_A", "phi_B", "alpha", "raw_omega"):
        before = encoder(input_ids=tokens).last_hidden_state
        with torch.no_grad():
            for name, p in model.named_parameters():
                if parameter in name:
                    p.mul_(1.5)
        after = encoder(input_ids=tokens).last_hidden_state
        assert not torch.equal(before, after), parameter
        backward(model, tokens)  # compiles anew, whatever was seen
        assert torch.equal(after, encoder(input_ids=tokens).last_hidden_state), parameter


def test_a_call_of_the_model_compiles_once_and_looks_at_no_module(bert, tokens, monkeypatch):
    """Its layers take what was compiled, until it ends, one way or the other."""
    model, looked, compiled = adapted(bert), [], []
    look, refresh = Compiled.made_of, Compiler.refresh
    monkeypatch.setattr(Compiled, "made_of", lambda self, *rest: looked.append(rest) or look(self, *rest))
    monkeypatch.setattr(Compiler, "refresh", lambda self: compiled.append(self) or refresh(self))
    layers = [module for module in model.modules() if isinstance(module, PhiLinear)]
    model(input_ids=tokens)
    assert (len(compiled), len(looked)) == (1, 0)
    with pytest.raises(IndexError):
        model(input_ids=tokens + 1000)  # which the vocabulary does not have
    looked.clear()
    layers[0](torch.ones(1, layers[0].in_features))
    assert len(looked) == 1


def test_what_has_not_changed_is_not_compiled_again(bert, tokens, monkeypatch):
    """In evaluation and while gradients accumulate: as long as factors, tables and what trains are the same."""
    model, compiled = adapted(bert), []
    refresh = Compiler.refresh
    monkeypatch.setattr(Compiler, "refresh", lambda self: compiled.append(self) or refresh(self))
    backward(model, tokens, slice(0, 2))
    backward(model, tokens, slice(2, 4))
    with torch.no_grad():
        first = model(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, first)
    assert len(compiled) == 1
    for parameter in ("phi_A", "phi_B", "alpha", "raw_omega"):
        compiled.clear()
        for name, p in model.named_parameters():
            if parameter in name:
                p.data = p.data * 1.5  # which changes no tensor's version
        backward(model, tokens)
        backward(model, tokens)
        assert len(compiled) == 1, parameter
    compiled.clear()
    for name, p in model.named_parameters():
        p.requires_grad_("alpha" not in name and p.requires_grad)
    backward(model, tokens)
    assert len(compiled) == 1


def test_an_evaluation_in_between_changes_nothing(bert, tokens, expected):
    model = adapted(bert)
    loss = model(input_ids=tokens, labels=LABELS).loss
    with torch.inference_mode():
        model(input_ids=tokens)
    with torch.no_grad():
        model(input_ids=tokens)
    loss.backward()
    assert_close(gradients(model), expected)
    model.zero_grad()
    backward(model, tokens)
    assert_close(gradients(model), expected)


def test_a_copy_is_independent(bert, tokens, expected):
    model = adapted(bert)
    backward(model, tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    other.zero_grad()
    backward(other, tokens)
    assert_close(gradients(other), expected)


def test_every_backend_has_the_same_gradients(bert, tokens, expected):
    for backend in ("torch", "direct"):
        model = adapted(bert, backend=backend)
        backward(model, tokens)
        assert_close(gradients(model), expected)


def test_a_backend_that_cannot_run_is_refused(bert, tokens):
    with pytest.raises(InputError, match='backend "triton" needs a CUDA device'):
        adapted(bert, backend="triton")(input_ids=tokens)


@pytest.mark.parametrize("method", ["fp8", "sketch:3"])
def test_an_estimated_dense_gradient_is_close_or_right_on_average(method, bert, tokens, expected):
    model = adapted(bert, dense_gradient=method)
    passes = 1 if method == "fp8" else 200
    for _ in range(passes):
        backward(model, tokens)
    for name, truth in expected.items():
        # On average: the error falls with the root of the number of passes.
        found = model.get_parameter(name).grad / passes
        assert (found - truth).norm() <= 0.4 * truth.norm() + 1e-6, name


@pytest.mark.parametrize("method", ["sketch", "sketch:1", "sketch:x", "fp16"])
def test_an_unknown_dense_gradient_is_refused(method):
    with pytest.raises(InputError, match="dense_gradient"):
        PhiConfig(dense_gradient=method)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_four_bit_weights(bert, tokens):
    """Training over quantised weights is training over the weights that they stand for."""
    import bitsandbytes as bnb
    from peft.utils.integrations import dequantize_module_weight

    quantised, plain = copy.deepcopy(bert), copy.deepcopy(bert)
    for name, module in bert.bert.encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            small = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=torch.float32)
            small.load_state_dict(module.state_dict())
            small = small.to("cpu")
            parent, _, child = name.rpartition(".")
            setattr(quantised.bert.encoder.get_submodule(parent), child, small)
            with torch.no_grad():
                plain.bert.encoder.get_submodule(name).weight.copy_(dequantize_module_weight(small))
    models = [adapted(base) for base in (quantised, plain)]
    for model in models:
        backward(model, tokens)
    assert_close(gradients(models[0]), gradients(models[1]))
    with pytest.raises(InputError, match="quantised"):
        models[0].merge_adapter()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"basis": "bspline", "omega_init": 3.0}], ids=["series", "table"])
def test_cuda_graph(bert, tokens, settings):
    """A captured step trains as an eager one does, the degrees of its series with it."""
    models = [adapted(bert, **settings).cuda() for _ in range(2)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models]
    inputs = {"input_ids": tokens.cuda(), "attention_mask": torch.ones_like(tokens).cuda(), "labels": LABELS.cuda()}

    def step(which):
        loss = models[which](**inputs).loss
        loss.backward()
        optimizers[which].step()
        optimizers[which].zero_grad()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(0)
    for _ in range(3):
        step(1)
    for _ in range(5):
        graph.replay()
        torch.testing.assert_close(loss, step(1), rtol=1e-4, atol=1e-5)
