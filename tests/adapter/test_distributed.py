"""Two processes train what one trains: by DDP, with the frozen weights in shards, and under a user's own FSDP."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from basisadapt import PhiConfig
from basisadapt.adapter.placement import PROJECTION
from basisadapt.core.settings import with_seed
from basisadapt.methods import METHODS
from basisadapt.phi.sharing import SHARING
from basisadapt.training.distributed.group import run_in_processes
from basisadapt.training.distributed.shard import gathered, shard_frozen
from tests.conftest import randomise, tiny

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these processes meet on the CPU; benchmarks/several_gpus.py is for GPUs"
)

STEPS = 4
CLIPPED = 0.1  # below every gradient's norm
LABELS = torch.tensor([0, 1, 2, 0])
WAYS = ["ddp", "shards", "fsdp"]
CASES = {
    **{("lora", way): {} for way in WAYS},
    **{("phi", way): {} for way in WAYS},
    ("phi", "shards, checkpointing"): {},
    ("phi", "fsdp, checkpointing"): {},
    ("phi, direct", "fsdp"): {"backend": "direct"},
    ("phi, any model", "fsdp"): {"task_type": None},  # peft calls it past PhiModel
    **{(f"phi, {sharing}", way): {"sharing": sharing} for sharing in SHARING if sharing != "none" for way in WAYS[1:]},
}


def tokens():
    return torch.randint(1, 60, (4, 7), generator=torch.Generator().manual_seed(1))


def adapted(kind, **settings):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=PROJECTION.pattern)
    phi = PhiConfig(**{"task_type": "SEQ_CLS", "r": 3, "num_basis": 10, "gain": 2.0, **settings})
    model = get_peft_model(tiny("llama"), lora if kind == "lora" else phi)
    randomise(model)
    if kind == "lora":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    return model.train()


def spread(model, way):
    """The model as it is called in a process of the group."""
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        for block in model.get_base_model().model.layers:
            fully_shard(block)
        return fully_shard(model)
    if way.startswith("shards"):
        shard_frozen(model)
    return DistributedDataParallel(model)


def train(model, called, rows=slice(None)):
    """Losses and norms of the gradient, step by step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = called(input_ids=tokens()[rows], labels=LABELS[rows]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
    return losses, norms


def in_two(folder, report):
    """All that these tests ask of a process of two: to start two takes as long as the work."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    written_by = {way: written(way, rows) for way in WAYS[1:]}
    return {"cases": every_case(folder), "half precision": mixed(), "written": written_by}


def every_case(folder):
    """Every case in this process: what the tests of it ask."""
    found = {}
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for (kind, way), settings in CASES.items():
        model = adapted(kind, **settings)
        called = spread(model, way)
        losses, norms = train(model, called, rows)
        tables = [
            p.to_local() if hasattr(p, "to_local") else p for n, p in model.named_parameters() if ".phi_bank." in n
        ]
        seen = {
            "losses": losses,
            "tables": [table.detach() for table in tables],
            "frozen": sum(local(p).numel() for p in model.parameters() if not p.requires_grad),
        }
        both = [None, None]
        dist.all_gather_object(both, seen)
        answers = model.eval()(input_ids=tokens()).logits.detach()
        found[kind, way] = {"norms": norms, "both": both, "answers": answers}
        save(model, way, folder / f"{kind}, {way}")
    return found


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def save(model, way, folder):
    """As users do: the whole state where FSDP holds shards of the adapter, else the first process alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = None
    if way.startswith("fsdp"):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {"folder": folder, **run_in_processes(in_two, (folder,), 2)}


@functools.cache
def alone(kind, settings):
    """What a process by itself finds: losses, norms, and how many weights are frozen."""
    model = adapted(kind, **dict(settings))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return *train(model, model), frozen


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_two_processes_train_as_one(kind, way, of_two):
    result = of_two["cases"][kind, way]
    losses, norms, _ = alone(kind, tuple(CASES[kind, way].items()))
    mean = [(a + b) / 2 for a, b in zip(*(both["losses"] for both in result["both"]), strict=True)]
    assert mean == pytest.approx(losses, abs=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > CLIPPED

    loaded = PeftModel.from_pretrained(tiny("llama"), of_two["folder"] / f"{kind}, {way}").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens()).logits, result["answers"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_tables_are_equal_and_frozen_weights_shared_out(kind, way, of_two):
    first, second = of_two["cases"][kind, way]["both"]
    *_, whole = alone(kind, tuple(CASES[kind, way].items()))
    assert first["frozen"] + second["frozen"] == (2 * whole if way == "ddp" else whole)
    if not way.startswith("fsdp"):  # which shards the tables as well
        assert len(first["tables"]) == (0 if kind == "lora" else 2)
        assert all(map(torch.equal, first["tables"], second["tables"]))


def mixed():
    """This process's losses, and the other's, in FSDP's bfloat16 and in autocast's over shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model = adapted("phi")
    for block in model.get_base_model().model.layers:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    losses = [train(model, model, rows)[0]]
    model = adapted("phi")
    shard_frozen(model)
    losses.append(train(model, torch.autocast("cpu", torch.bfloat16)(DistributedDataParallel(model)), rows)[0])
    both = [None, None]
    dist.all_gather_object(both, losses)
    return both


def every_method(report):
    """Two steps of each method with its frozen weights in shards, and ΔW of a layer; this process's losses."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found = {}
    for name in adapting_methods():
        model = with_method(name)
        shard_frozen(model)
        losses = two_steps(model, DistributedDataParallel(model), rows)
        both = [None, None]
        dist.all_gather_object(both, losses)
        layer = next(m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight"))
        with gathered(layer):
            found[name] = both, change_of(METHODS[name]().weight_change, layer)
    return found


def adapting_methods():
    return [name for name in METHODS if hasattr(with_method(name), "peft_config")]


def with_method(name):
    torch.manual_seed(0)
    base = tiny("bert")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return METHODS[name]().attach(base, with_seed(METHODS[name].settings(r=2), 0), "SEQ_CLS").train()


def two_steps(model, called, rows=slice(None)):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = called(input_ids=tokens()[rows], labels=LABELS[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def change_of(weight_change, layer):
    change = weight_change(layer)
    return None if change is None else change.clone()


def test_half_precision_stays_close(of_two):
    losses, *_ = alone("phi", ())
    for a, b in zip(*of_two["half precision"], strict=True):
        assert [(x + y) / 2 for x, y in zip(a, b, strict=True)] == pytest.approx(losses, rel=0.05)


def written(way, rows=slice(None)):
    """The logits of what a language model writes right after an update, which no forward pass has seen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, eos_token_id=None, **shape))
    model = get_peft_model(base, PhiConfig(task_type="CAUSAL_LM", r=3, num_basis=10, gain=2.0))
    randomise(model)
    called = model if way == "alone" else spread(model, way)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    called(input_ids=tokens()[rows], labels=tokens()[rows]).loss.backward()
    with torch.no_grad():
        model(input_ids=tokens())
    if way == "fsdp":
        model.reshard()  # or FSDP would keep what is outside the blocks as it was in that pass
    optimizer.step()
    if way == "fsdp":
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "generate")
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.eval().generate(input_ids=tokens(), **how).logits).clone()


def test_sharded_models_write_as_one(of_two):
    truth = written("alone")
    for way, found in of_two["written"].items():
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-4, msg=way)


@pytest.mark.slow
def test_every_method_trains_over_shards():
    for name, ((first, second), change) in run_in_processes(every_method, (), 2).items():
        model = with_method(name)
        losses = two_steps(model, model)
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        assert mean == pytest.approx(losses, abs=1e-5), name
        layer = next(m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight"))
        truth = change_of(METHODS[name]().weight_change, layer)
        assert (change is None) == (truth is None), name
        if truth is not None:
            torch.testing.assert_close(change, truth, rtol=1e-3, atol=1e-6, msg=name)
