"""Training on several GPUs of a host against one: φ(BA) and LoRA, by DDP and with the frozen weights in shards (FSDP2).

    python benchmarks/several_gpus.py                                   # LLaMA3-8B shapes, random weights, all GPUs
    python benchmarks/several_gpus.py --shapes tiny --processes 2       # on a CPU: does everything run?

A batch is the same, in rows, tokens and order, however many processes divide it, so that the losses are the same up to
rounding. First one process trains alone, then all together, each way. Tokens per second are those of all processes,
after steps that are not timed; the peak is the largest of any process. At the end the tables of φ are compared between
the processes, bit by bit, and the adapter is saved by one of them and loaded by one process alone: its tensors must be
those in the model, bit by bit, and its answers close. Where anything differs, it is said and no speed is reported.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from basisadapt import PhiConfig, backbones
from basisadapt.adapter.placement import PROJECTION
from basisadapt.core.environment import environment
from basisadapt.training.distributed.group import run_in_processes
from basisadapt.training.distributed.shard import shard_frozen

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNTIMED = 4  # steps until memory is laid out
ONE = "one process"
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # what losses may differ by, as a share
# Answers of 32 layers in bfloat16 move by 2e-2 where one weight in a hundred of a single matrix is rounded otherwise.
ANSWERS = {torch.bfloat16: 5e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """What is trained. batch: rows of a step, of all processes together; way: "ddp", "fsdp" or ONE."""

    shapes: str
    method: str
    way: str
    batch: int
    tokens: int
    rank: int
    steps: int
    checkpointing: bool

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return torch.float32 if self.shapes == "tiny" else torch.bfloat16

    def base(self) -> PreTrainedModel:
        """The model with random weights, equal in all processes."""
        shapes = TINY if self.shapes == "tiny" else backbones.find(self.shapes).shapes
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes), dtype=self.dtype)

    def adapted(self) -> nn.Module:
        """The model with the adapter in it, B and φ's amplitudes of the size that training gives them."""
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=self.rank, target_modules=PROJECTION.pattern
        )
        phi = PhiConfig(task_type="CAUSAL_LM", r=self.rank)
        model = peft.get_peft_model(self.base(), phi if self.method == "phi" else lora).train()
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "phi_B" in name or "lora_B" in name or name.endswith(".alpha"):
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        return model

    def rows(self, step: int) -> Tensor:
        """This process's rows of a step."""
        vocabulary = TINY["vocab_size"] if self.shapes == "tiny" else backbones.find(self.shapes).shapes["vocab_size"]
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(1, vocabulary, (self.batch, self.tokens), generator=generator)
        return rows[dist.get_rank() :: dist.get_world_size()].to(self.device)


@dataclass(frozen=True)
class Result:
    """What was measured. losses: of every step, over all rows; peak: bytes, NaN on a CPU; error: of the answers of the
    adapter loaded by one process, the largest, relative to the largest answer; faults: in words."""

    losses: list[float]
    tokens_per_second: float
    peak: float
    error: float
    faults: list[str]


def train(case: Case, folder: Path, report: Callable[[Any], None]) -> Result:
    """The case in this process of its group."""
    model = case.adapted()
    if case.way == "fsdp":
        shard_frozen(model)
    called = model if case.way == ONE else DistributedDataParallel(model)
    gc.collect()
    on_gpu = case.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for step in range(UNTIMED + case.steps):
        if step == UNTIMED:
            began = now(on_gpu)
        rows = case.rows(step)
        loss = called(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = now(on_gpu) - began
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_gpu else float("nan"), device=case.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    faults = [f"{name} differs between the processes" for name, p in model.named_parameters() if differs(p)]
    return Result(
        losses=(mean / dist.get_world_size()).tolist(),
        tokens_per_second=case.batch * case.tokens * case.steps / seconds,
        peak=peak.item(),
        error=save_and_load(case, model, folder, faults),
        faults=faults,
    )


def now(on_gpu: bool) -> float:
    """Seconds, when all processes have come so far."""
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def differs(parameter: Tensor) -> bool:
    """Whether a parameter that trains is not the same, bit for bit, in all processes."""
    if not parameter.requires_grad:
        return False
    lowest, highest = parameter.detach().clone(), parameter.detach().clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return not torch.equal(lowest, highest)


@torch.no_grad()
def save_and_load(case: Case, model: nn.Module, folder: Path, faults: list[str]) -> float:
    """How far the answers of the adapter that one process saves, loaded by it alone, are from the model's; there alone.

    faults gets the tensors that are not the same, bit by bit.
    """
    probe = torch.arange(1, 33).unsqueeze(0).to(case.device)
    truth = model.eval()(input_ids=probe).logits.float()
    if dist.get_rank() > 0:
        return 0.0
    model.save_pretrained(folder)
    alone = peft.PeftModel.from_pretrained(case.base(), folder).eval()
    loaded = peft.get_peft_model_state_dict(alone)
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        if not torch.equal(tensor, loaded[name]):
            faults.append(f"{name} is loaded as something else")
    return ((alone(input_ids=probe).logits.float() - truth).abs().max() / truth.abs().max()).item()


def compare(alone: Result, together: Result, dtype: torch.dtype) -> list[str]:
    """What is wrong with the losses and with the loaded adapter's answers."""
    pairs = zip(together.losses, alone.losses, strict=True)
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    faults = [] if worst <= CLOSE[dtype] else [f"losses differ from one process's by {worst:.1e}"]
    return faults + ([] if together.error <= ANSWERS[dtype] else ["the loaded adapter answers differently"])


def main() -> None:
    """Train each method alone and together; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama3-8b", help="tiny, or a backbone whose shapes are known")
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, of all processes together")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--methods", nargs="+", default=["phi", "lora"], choices=["phi", "lora"])
    parser.add_argument("--ways", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    options = parser.parse_args()
    if options.batch % options.processes:
        raise SystemExit(f"--batch must be a multiple of --processes, {options.processes}")

    print("command: python", " ".join(sys.argv))
    print(f"machine: {platform.processor() or platform.machine()}, {options.processes} processes")
    print(*(f"{name}: {value}" for name, value in environment().items()), sep="\n")
    columns = ["method", "way", "processes", "tokens/s", "of one process", "peak GiB of each", "loaded adapter's error"]
    print("\n|", *(f"{column} |" for column in [*columns, "loss, first and last"]))
    print("|---|---|---:|---:|---:|---:|---:|---|")
    faulty = False
    for method in options.methods:
        alone: Result | None = None
        for way in [ONE, *options.ways]:
            case = Case(
                options.shapes, method, way, options.batch, options.tokens, options.rank, options.steps,
                options.checkpointing,
            )  # fmt: skip
            processes = 1 if way == ONE else options.processes
            with tempfile.TemporaryDirectory() as folder:
                result: Result = run_in_processes(train, (case, Path(folder)), processes)
            alone = alone or result
            faults = result.faults + compare(alone, result, case.dtype)
            faulty = faulty or bool(faults)
            share = result.tokens_per_second / alone.tokens_per_second
            speed = (
                "wrong: " + "; ".join(faults) + " | -" if faults else f"{result.tokens_per_second:,.0f} | {share:.2f}"
            )
            losses = f"{result.losses[0]:.5f}, {result.losses[-1]:.5f}"
            measured = f"{speed} | {result.peak / 2**30:.2f} | {result.error:.1e} | {losses}"
            print(f"| {method} | {way} | {processes} | {measured} |", flush=True)
    if faulty:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
