"""torch.compile of a model with φ(BA): what the eager model gives, in few graphs that serve every step.

By `aot_eager`, which traces and differentiates as inductor does and compiles nothing; inductor's own test is slow.
"""

from __future__ import annotations

import copy
from weakref import WeakValueDictionary

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi import operators
from basisadapt.phi.evaluators import Direct
from tests.adapter.toys import X, draw, two
from tests.adapter.toys import adapted as toy

TOKENS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model(**settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    settings = {"num_basis": 10, "gain": 20.0, "target_modules": ["q_proj", "down_proj"], **settings}
    adapted = get_peft_model(base, PhiConfig(task_type="CAUSAL_LM", r=3, **settings)).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "phi_B" in name or "alpha" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return adapted


def regional(adapted, backend="aot_eager"):
    # So that the first layer's input needs a gradient as the others' does: else it takes a graph of its own.
    adapted.enable_input_require_grads()
    for layer in adapted.base_model.model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return adapted


def as_trained(adapted, backend="aot_eager"):
    """As `training.compiled` compiles blocks: one graph for all shapes of a batch."""
    adapted.enable_input_require_grads()
    for layer in adapted.base_model.model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    return adapted


def whole(adapted, backend="aot_eager"):
    return torch.compile(adapted, backend=backend)


def degrees(adapted):
    found = []
    for layer in (module for module in adapted.modules() if isinstance(module, PhiLinear)):
        found.append(getattr(layer.phi_link["default"].function.evaluator, "expected", None))
    return found


def trained(adapted, call, steps=20):
    """Losses, the gradients of every step, and every layer's degree, step by step."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses, gradients, seen = [], [], []
    for _ in range(steps):
        loss = call(**INPUTS).loss
        loss.backward()
        losses.append(loss.detach())
        seen.append(degrees(adapted))
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, seen


def assert_same(found, truth):
    torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], truth[1], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def eager():
    adapted = model()
    return trained(adapted, adapted)


@pytest.mark.parametrize("way", [regional, as_trained, whole])
def test_twenty_steps_are_the_eager_ones_and_take_one_graph(way, eager):
    adapted = model()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(adapted, way(adapted))
    assert_same(found, eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert len({tuple(step) for step in eager[2]}) > 2  # the degrees have changed, and the graph has not


@pytest.mark.slow
@pytest.mark.parametrize("way", [regional, whole])
def test_by_inductor(way, eager):
    adapted = model()
    assert_same(trained(adapted, way(adapted, "inductor")), eager)
    assert counters["stats"]["unique_graphs"] == 1


def compiled(adapted, **options):
    """A toy whose base model is compiled: the peft model around it brings φ up to date."""
    adapted.base_model.model.compile(backend="aot_eager", **{"fullgraph": True, **options})
    return adapted


def gradients(adapted):
    adapted.zero_grad()
    adapted(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


def test_two_passes_before_a_backward_pass():
    found = []
    for adapted in (toy(), compiled(toy())):
        draw(adapted, 3)
        (adapted(X).square().sum() + adapted(2 * X).square().sum()).backward()
        with torch.no_grad():
            adapted(X)
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    eager, ours = found
    assert eager.keys() == ours.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(ours[name], gradient)


def step(adapted, seed):
    draw(adapted, seed)


def load(adapted, seed):
    other = toy()
    draw(other, seed)
    adapted.load_state_dict(other.state_dict())


def without_gradients(adapted, seed):
    with torch.no_grad():
        adapted(X)


def inference(adapted, seed):
    with torch.inference_mode():
        adapted(X)


def merge(adapted, seed):
    adapted.merge_adapter()
    adapted(X)
    adapted.unmerge_adapter()


def disable(adapted, seed):
    with adapted.disable_adapter():
        adapted(X)


HISTORIES = [
    [without_gradients, step, without_gradients],
    [inference, step, step, inference],
    [load, without_gradients, load],
    [step, merge, step],
    [step, disable, without_gradients, load],
]


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: " ".join(event.__name__ for event in history))
def test_histories(history):
    ours, eager = compiled(toy()), toy()
    for seed, event in enumerate(history):
        event(ours, seed)
        event(eager, seed)
        torch.testing.assert_close(gradients(ours), gradients(eager))
        assert torch.equal(ours(X), eager(X))


@pytest.mark.parametrize("case", ["Conv1D", "Blocks", "MLP, two layers", "MLP without bias"])
def test_other_layers(case):
    torch.testing.assert_close(gradients(compiled(toy(case))), gradients(toy(case)))


@pytest.mark.parametrize("settings", [{"backend": "direct"}, {"gain": 300.0, "omega_init": 3.0}, {"dropout": 0.5}])
def test_other_evaluators_and_paths(settings):
    ours, eager = compiled(toy(**settings)), toy(**settings)
    torch.testing.assert_close(gradients(ours), gradients(eager))


def test_autocast():
    answers = []
    for adapted in (compiled(toy().float()), toy().float()):
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(X.float())
        y.float().square().sum().backward()
        answers.append([y, *(p.grad for p in adapted.parameters() if p.grad is not None)])
    assert answers[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*answers)


def test_two_adapters():
    models = [two("lin0", "lin0") for _ in range(2)]
    for adapted in models:
        adapted.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(gradients(compiled(models[0])), gradients(models[1]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_compiled_part(reentrant):
    from torch.utils.checkpoint import checkpoint

    ours, eager = toy(), toy()
    ours.base_model.model.lin0.compile(backend="aot_eager", fullgraph=True)
    model = ours.base_model.model

    def forward(x):
        x = checkpoint(model.lin0, x, use_reentrant=reentrant)
        return model.head(torch.relu(model.lin1(torch.relu(x))))

    model.forward = forward
    x = X.clone().requires_grad_()
    ours(x).square().sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients(eager))


def test_another_kind_of_evaluator_takes_the_same_graph():
    ours = compiled(toy(num_basis=100))
    gradients(ours)
    ours.base_model.model.lin0.phi_source["default"]._setting = "direct"
    draw(ours, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = gradients(ours)
    ours.base_model.model._compiled_call_impl = None
    torch.testing.assert_close(found, gradients(ours))
    assert isinstance(ours.base_model.model.lin0.phi_link["default"].function.evaluator, Direct)


def test_a_compiled_part_called_by_itself_is_right_or_refused():
    ours = toy()
    part = ours.base_model.model
    part.compile(backend="aot_eager")
    first = part(X)  # nothing is compiled of φ: the layer is left out of the graph
    assert torch.equal(first, ours(X))
    assert torch.equal(first, part(X))
    draw(ours, 1)
    with pytest.raises(InputError, match="call the peft model"):
        part(X)
    assert torch.equal(ours(X), toy_at(1)(X))


def test_links_know_whether_the_model_is_being_called():
    ours, seen = toy(), []
    layer = ours.base_model.model.lin0
    link = layer.phi_link["default"]
    layer.register_forward_hook(lambda *_: seen.append(link.call.under_way))
    ours(X)
    ours.base_model.model(X)
    with pytest.raises(RuntimeError):
        ours(X[:, :1])
    assert seen == [True, False]
    assert not link.call.under_way


def toy_at(seed):
    adapted = toy()
    draw(adapted, seed)
    return adapted


def test_a_copy_has_its_own_functions():
    ours = compiled(toy())
    ours(X)
    other = copy.deepcopy(ours)
    draw(ours, 1)
    torch.testing.assert_close(gradients(other), gradients(toy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_export_of_the_peft_model_is_refused(dtype, called):
    adapted, x = toy().to(dtype), X.to(dtype)
    if called:
        adapted(x)
    for part in (adapted, adapted.base_model, adapted.base_model.model):
        with pytest.raises(InputError, match="export the plain model that merge_and_unload"):
            torch.export.export(part, (x,))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="export the plain model that merge_and_unload"):
        torch.export.export(adapted, (x,), strict=True)


def test_the_merged_model_is_exported():
    adapted = toy()
    expected = adapted(X)
    exported = torch.export.export(adapted.merge_and_unload(), (X,))
    torch.testing.assert_close(exported.module()(X), expected)


def test_derivatives_of_derivatives_are_refused():
    ours = toy()
    factors = {name: p for name, p in ours.named_parameters() if "phi_A" in name}
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda given: torch.func.functional_call(ours, given, (X,)).sum())(factors)
    (gradient,) = torch.autograd.grad(compiled(ours)(X).square().sum(), list(factors.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_compiling_phi_takes_as_many_launches_however_many_layers():
    """What is made for every layer is room that nobody fills, and a number on the CPU."""
    counts = []
    for number in (2, 6):
        layers = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(number)))
        ours = get_peft_model(layers, PhiConfig(r=2, num_basis=5, target_modules=r"\d"))
        with torch.no_grad():
            for layer in layers:
                layer.phi_B["default"].fill_(0.1)
        ours(X.float())
        seen = []

        class Recorded(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, seen=seen):
                if function.overloadpacket not in NO_LAUNCH:
                    seen.append(str(function))
                return function(*args, **(kwargs or {}))

        with Recorded():
            ours.base_model.model[0].phi_source["default"].refresh()
        counts.append(sorted(seen))
    assert counts[0] == counts[1]


NO_LAUNCH = (torch.ops.aten.detach, torch.ops.aten.new_empty, torch.ops.aten.scalar_tensor)


class Unread(WeakValueDictionary):
    def __getitem__(self, key):
        raise AssertionError("a graph looks its function up")


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


FEW, NYQUIST = {}, {"preset": "nyquist", "num_basis": 50, "gain": None}


@on_cuda
@pytest.mark.parametrize(
    ("way", "settings", "weights", "mode"),
    [
        (regional, FEW, torch.float32, "default"),
        (whole, FEW, torch.float32, "default"),
        (regional, FEW, torch.bfloat16, "default"),
        (whole, NYQUIST, torch.bfloat16, "default"),
        (regional, NYQUIST, "autocast", "default"),
        (whole, FEW, "autocast", "default"),
        (regional, FEW, torch.bfloat16, "reduce-overhead"),
        (whole, FEW, torch.float32, "reduce-overhead"),
        (as_trained, FEW, torch.bfloat16, "default"),
        (as_trained, NYQUIST, "autocast", "default"),
    ],
)
def test_on_a_gpu(way, settings, weights, mode, monkeypatch):
    """Five steps by inductor are those of the eager model, and no graph looks a function up."""
    monkeypatch.setattr(operators, "_known", Unread())
    results = []
    dtype = torch.float32 if weights == "autocast" else weights
    for compiling in (False, True):
        adapted = model(**settings).to(dtype).cuda()
        call = adapted
        if compiling and way is whole:
            call = torch.compile(adapted, mode=mode)
        elif compiling and way is as_trained:
            as_trained(adapted, "inductor")
        elif compiling:
            adapted.enable_input_require_grads()
            for layer in adapted.base_model.model.model.layers:
                layer.compile(mode=mode, fullgraph=True)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
        losses, found = [], []
        for number in range(5):
            with torch.autocast("cuda", torch.bfloat16, enabled=weights == "autocast"):
                loss = call(input_ids=TOKENS.cuda(), labels=TOKENS.cuda(), use_cache=False).loss
            loss.backward()
            losses.append(loss.detach().clone())
            if number == 0:
                found = [p.grad.float().clone() for p in adapted.parameters() if p.requires_grad]
            optimizer.step()
            optimizer.zero_grad()
        results.append((torch.stack(losses).float(), found))
    (losses, truth), (ours, found) = results
    exact = weights is torch.float32
    torch.testing.assert_close(ours, losses, rtol=1e-4 if exact else 2e-2, atol=0)
    for gradient, expected in zip(found, truth, strict=True):
        assert (gradient - expected).norm() <= (1e-3 if exact else 0.1) * expected.norm() + 1e-6


@on_cuda
@pytest.mark.parametrize("settings", [FEW, NYQUIST])
@pytest.mark.parametrize("way", [regional, whole])
def test_cuda_graphs_are_captured_once(way, settings, monkeypatch):
    """Not again in every step, for numbers of φ that have moved."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    captured = [0]
    record = CUDAGraphTreeManager.record_function
    monkeypatch.setattr(
        CUDAGraphTreeManager,
        "record_function",
        lambda *arguments: (captured.append(captured.pop() + 1), record(*arguments))[1],
    )
    adapted = model(**settings).to(torch.bfloat16).cuda()
    call = adapted
    if way is whole:
        call = torch.compile(adapted, mode="reduce-overhead")
    else:
        adapted.enable_input_require_grads()
        for layer in adapted.base_model.model.model.layers:
            layer.compile(mode="reduce-overhead", fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    counts = []
    for _ in range(9):
        call(input_ids=TOKENS.cuda(), labels=TOKENS.cuda(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(captured[0])
    assert counts[-1] > 0
    assert counts[5:] == counts[-1:] * 4
