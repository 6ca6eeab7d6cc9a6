"""One training step under φ(BA) and its rivals, in one run: forward, backward and AdamW, dropout off.

    python benchmarks/train_step.py minilm                      # on a CPU: against LoRA and the direct path
    python benchmarks/train_step.py qwen2-0.5b --rank 16 32 --checkpointing no yes      # on a GPU, random weights
    python benchmarks/train_step.py llama3-8b --batch 4 16 --checkpointing yes --methods "phi, N = 50;fp8;sketch"
    python benchmarks/train_step.py qwen2-0.5b --batch 4x128 16x512 --compile no regional whole --rounds 1 --budget 500

Several values of an option are several tables; those of --compile are rows of one: not compiled, each block by itself
(regional; reduced: as CUDA graphs), the whole model. The methods take turns; each turn begins with steps that are not
timed, and that compile. Every turn is printed as it ends, the table after all of them; where --budget has run out, it
says what it lacks.
The figure is the median over rounds of the ratio to LoRA's step in the same round; on a GPU also tokens per second, the
time until the host has launched a step, the kernels of a step, the time in which the GPU computes, and the peak of
allocated memory. A and B are set to the size that training gives them, φ's amplitudes are drawn. Before anything is
timed, ΔW of every module is held against the direct sum: where they differ by more than the tolerance, the error is
printed and no time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from basisadapt import backbones
from basisadapt.adapter import PhiConfig, PhiLinear
from basisadapt.adapter.placement import PROJECTION
from basisadapt.core.environment import environment
from basisadapt.phi import choice
from basisadapt.phi.choice import default_tolerance
from basisadapt.phi.evaluators import Direct
from basisadapt.phi.weight import delta_weight

LABELS = 10
UNTIMED = 4  # steps until memory is laid out
BLOCKWISE = {"regional": "default", "reduced": "reduce-overhead"}  # each block by itself, in this mode of torch


@dataclass(frozen=True)
class Case:
    """What is trained: a backbone, batch × tokens, rank.

    autocast: its weights in float32 and its products in bfloat16, instead of both in bfloat16.
    """

    backbone: str
    batch: int
    tokens: int
    rank: int
    checkpointing: bool = False
    graph: bool = False
    autocast: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.autocast or self.backbone == "minilm" else torch.bfloat16

    def base(self) -> PreTrainedModel:
        """The model: MiniLM with its weights and a classifier, the others with random weights in bfloat16."""
        torch.manual_seed(0)
        if self.backbone == "minilm":
            model = backbones.load(backbones.find("minilm"), "text", LABELS)[0].to(self.device)
        else:
            config = AutoConfig.for_model(**(backbones.find(self.backbone).shapes or {}))
            with self.device:
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the weights their dtype, and switch checkpointing on or off."""
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        if not self.checkpointing:
            model.gradient_checkpointing_disable()
            return
        # The states of random numbers cannot be read while a graph is captured; without dropout nobody needs them.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": not self.graph})

    def inputs(self) -> dict[str, Any]:
        """Random tokens and labels."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1000, 30000, (self.batch, self.tokens), generator=generator).to(self.device)
        labels = torch.randint(0, LABELS, (self.batch,), generator=generator).to(self.device)
        if self.backbone == "minilm":
            return {"input_ids": tokens, "labels": labels}
        return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def rivals(case: Case) -> dict[str, Any]:
    """peft configurations by name; None is full fine-tuning."""
    import peft

    task = {"task_type": "SEQ_CLS" if case.backbone == "minilm" else "CAUSAL_LM"}
    common = {**task, "target_modules": PROJECTION.pattern}
    lora = {**common, "r": case.rank, "lora_alpha": case.rank}
    phi = {**task, "r": case.rank}
    methods: dict[str, Any] = {
        "LoRA (peft)": peft.LoraConfig(**lora),
        "phi, N = 8": PhiConfig(**phi, num_basis=8),
        "phi, N = 50": PhiConfig(**phi, num_basis=50),
        "phi, N = 512": PhiConfig(**phi, num_basis=512),
        "phi, Nyquist, N = 50": PhiConfig(**phi, num_basis=50, preset="nyquist"),
    }
    if case.device.type == "cpu":
        return {**methods, "phi direct, N = 50": PhiConfig(**phi, num_basis=50, backend="direct")}
    return {
        **methods,
        "phi, fp8 dense gradient": PhiConfig(**phi, num_basis=50, dense_gradient="fp8"),
        "phi, sketch of 4 tokens": PhiConfig(**phi, num_basis=50, dense_gradient="sketch:4"),
        "LoRA, dropout 0.05": peft.LoraConfig(**lora, lora_dropout=0.05),
        "DoRA": peft.LoraConfig(**lora, use_dora=True),
        "VeRA": peft.VeraConfig(**common, r=case.rank, vera_dropout=0.0),
        "RandLoRA": peft.RandLoraConfig(**common, r=case.rank, randlora_dropout=0.0),
        "full fine-tuning": None,
    }


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Step:
    """A model with a method's adapter, and one training step of it."""

    def __init__(self, case: Case, base: PreTrainedModel, method: Any, compiling: str) -> None:
        import peft

        self.model: nn.Module = base
        if method is not None:
            torch.manual_seed(0)
            self.model = peft.get_peft_model(base, method).train()
        if case.checkpointing and method is not None:
            base.enable_input_require_grads()
        self._as_after_training()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-6, foreach=True, capturable=case.graph)
        self.inputs = case.inputs()
        self.call: Callable[..., Any] = self.model
        self.autocast = torch.autocast(case.device.type, torch.bfloat16, enabled=case.autocast)
        if compiling in BLOCKWISE:
            for block in blocks(base):
                block.compile(mode=BLOCKWISE[compiling])
        if compiling == "whole":
            self.call = torch.compile(self.model)

    @torch.no_grad()
    def _as_after_training(self) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if "phi_B" in name or "lora_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(".alpha"):
                scale = 0.5 / parameter.shape[-1]
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def __call__(self) -> Tensor:
        """Forward, backward, AdamW; the loss."""
        with self.autocast:
            loss: Tensor = self.call(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def captured(step: Step) -> Callable[[], Tensor]:
    """The step as one CUDA graph: the host launches it, and nothing else."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


@dataclass
class Result:
    """What was measured of one method."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # seconds until the last kernel of a step is launched
    peak: float = 0.0
    trainable: int = 0
    loss: float = 0.0
    graphs: int = 0  # that torch compiled for the first step, and for later ones
    late: int = 0


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@dataclass(frozen=True)
class Turns:
    """What is measured of each case, and how often; `deadline` (by time.monotonic): then nothing more is begun."""

    methods: list[str]  # parts of names
    compiling: list[str]
    rounds: int
    steps: int
    deadline: float

    def late(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() >= self.deadline


def timed(step: Callable[[], object], device: torch.device, steps: int) -> tuple[float, float]:
    """Seconds per step, after some that are not timed, and those until one more step is launched."""
    for _ in range(UNTIMED):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seconds, host


def busy(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds of kernels in one step, copies included, and how many there are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return sum(event.self_device_time_total for event in events) / 1e6, sum(event.count for event in events)


@contextlib.contextmanager
def attached(case: Case, base: PreTrainedModel, method: Any, compiling: str = "no") -> Iterator[Step]:
    """A step of the shared base model; the adapter is gone afterwards, the base as before."""
    for parameter in base.parameters():
        parameter.requires_grad_(method is None)
    step = Step(case, base, method, compiling)
    try:
        yield step
    finally:
        for block in blocks(base):
            block._compiled_call_impl = None
        torch.compiler.reset()
        if method is not None:
            step.model.unload()
        del step
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def check(case: Case, base: PreTrainedModel) -> float:
    """The largest error of ΔW over the modules, against the direct sum, relative to the largest value of that ΔW."""
    task = "SEQ_CLS" if case.backbone == "minilm" else "CAUSAL_LM"
    with attached(case, base, PhiConfig(task_type=task, r=case.rank, num_basis=8)) as step:
        layers = [module for module in step.model.modules() if isinstance(module, PhiLinear)]
        worst = 0.0
        for layer in layers:
            found, source = layer.get_delta_weight("default"), layer.phi_source["default"]
            A, B = layer.phi_A["default"], layer.phi_B["default"]
            truth = delta_weight(A, B, Direct(source.transfer(layer.name)), "torch")
            worst = max(worst, ((found - truth).abs().max() / truth.abs().max()).item())
    return worst


Results = dict[tuple[str, str], Result]  # by method and way to compile


def measure(case: Case, base: PreTrainedModel, turns: Turns) -> Results:
    """The methods in turn, a round after the other; the base model is shared, so that its weights are there once."""
    names = [name for name in rivals(case) if any(word in name for word in ["LoRA (peft)", *turns.methods])]
    results = {(name, compiling): Result() for compiling in turns.compiling for name in names}
    if turns.late():
        return results
    error = check(case, base)
    print(f"largest error of ΔW against the direct sum, relative to its largest value: {error:.1e}")
    if not error <= 2 * default_tolerance(base.dtype):
        raise SystemExit("wrong value: nothing is timed")
    for number, ((name, compiling), result) in itertools.product(range(turns.rounds), results.items()):
        if turns.late():
            break
        method, before = rivals(case)[name], compiled_graphs()
        try:
            with attached(case, base, method, compiling) as step:
                run = captured(step) if case.graph else step
                run()
                first = compiled_graphs()
                seconds, host = timed(run, case.device, turns.steps)
                result.graphs, result.late = first - before, compiled_graphs() - first
                result.trainable, result.loss = step.count, run().item()
                if case.device.type == "cuda":
                    result.peak = max(result.peak, torch.cuda.max_memory_allocated() / 2**30)
                del run  # a graph keeps all the memory of its step
        except (torch.OutOfMemoryError, ValueError, RuntimeError) as problem:
            print(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0]}")
            seconds = host = math.nan
        result.seconds.append(seconds)
        result.host.append(host)
        beside = f", {host * 1e3:.1f} to launch it, {result.peak:.2f} GiB" if case.device.type == "cuda" else ""
        print(f"round {number + 1}, {name}, {compiling} compile: {seconds * 1e3:.1f} ms{beside}", flush=True)
    return results


def products_bound(case: Case, rate: float) -> float:
    """Seconds that the matrix products of the adapted layers alone take at `rate`: forward, its recomputation where
    there is checkpointing, dX and the dense gradient; attention and the vocabulary's layer not counted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**backbones.find(case.backbone).shapes))
    adapted = sum(m.weight.numel() for name, m in model.named_modules() if PROJECTION.fullmatch(name))
    passes = 4 if case.checkpointing else 3
    return 2 * case.batch * case.tokens * adapted * passes / rate


def ratio(result: Result, other: Result) -> list[float]:
    """Of the steps of each round that has both."""
    return [a / b for a, b in zip(result.seconds, other.seconds, strict=False)]


def shown(figure: Callable[[list[float]], float], values: list[float]) -> str:
    """The median, the least or the largest of some ratios; a dash for none."""
    return f"{figure(values):.2f}" if values else "–"


def report(case: Case, results: Results) -> None:
    """The table, and what is not in it."""
    on_gpu = case.device.type == "cuda"
    modes = list(dict.fromkeys(compiling for _, compiling in results))
    beside = [f"/ LoRA's, {mode} compile |" for mode in modes] if len(modes) > 1 else ["step / LoRA's step, median |"]
    more = ["launched in, ms |", "tokens/s |", "peak GiB |", "trainable |"] if on_gpu else []
    graphs = ["graphs | later |"] if modes != ["no"] else []
    columns = ["| method | compile | step, ms |", *beside, "min | max |", *graphs, *more]
    print("\n" + " ".join(columns))
    print("|---|---|" + "---:|" * (sum(column.count("|") for column in columns) - 3))
    measured = {key: result for key, result in results.items() if result.seconds}
    for (name, compiling), result in measured.items():
        of_lora = {mode: ratio(result, results["LoRA (peft)", mode]) for mode in modes}
        seconds = statistics.median(result.seconds)
        row = [name, compiling, f"{seconds * 1e3:.1f}", *(shown(statistics.median, of_lora[mode]) for mode in modes)]
        row += [shown(min, of_lora[compiling]), shown(max, of_lora[compiling])]
        row += [str(result.graphs), str(result.late)] if graphs else []
        if on_gpu:
            row += [f"{statistics.median(result.host) * 1e3:.1f}", f"{case.batch * case.tokens / seconds:,.0f}"]
            row += [f"{result.peak:.2f}", f"{result.trainable:,}"]
        print(f"| {' | '.join(row)} |", flush=True)
    if missing := [f"{name} ({compiling} compile)" for name, compiling in results if (name, compiling) not in measured]:
        print(f"\nnot measured, for the budget was spent: {', '.join(missing)}", flush=True)
    for many, few in (("phi, N = 512", "phi, N = 8"), ("phi direct, N = 50", "phi, N = 50")):
        if {(many, "no"), (few, "no")} <= set(measured):
            found = statistics.median(ratio(results[many, "no"], results[few, "no"]))
            print(f"\n{many} / {few}: {found:.3f}")


def report_busy(case: Case, base: PreTrainedModel, results: Results, rate: float, turns: Turns) -> None:
    """How long the GPU computes and how many kernels it runs, and what the products alone take at `rate`.

    Last of all: once a profiler has run in a process, every launch costs the host more. Without a graph, for the
    kernels are the same, and memory did not suffice for the next graph after a profiled one.
    """
    print("\n| method | compile | GPU at work, ms | kernels |\n|---|---|---:|---:|")
    for (name, compiling), result in results.items():
        if turns.late():
            print("the rest is not measured, for the budget was spent")
            return
        if result.seconds and math.isfinite(result.seconds[-1]):
            with attached(case, base, rivals(case)[name], compiling) as step:
                for _ in range(UNTIMED if compiling != "no" else 1):
                    step()
                seconds, kernels = busy(step)
            print(f"| {name} | {compiling} | {seconds * 1e3:.0f} | {kernels:,} |", flush=True)
    bound = products_bound(case, rate)
    print(f"\nproducts of the adapted layers at the measured {rate / 1e12:.0f} TFLOP/s: {bound * 1e3:.0f} ms")
    for (name, compiling), result in results.items():
        if name == "phi, N = 50" and result.seconds:
            share = bound / statistics.median(result.seconds)
            print(f"{share:.0%} of φ's step, {compiling} compile", flush=True)


def merged_inference(case: Case, base: PreTrainedModel) -> None:
    """The forward pass of the plain model, and of the same model with φ(BA) merged into it."""
    import peft

    tokens = case.inputs()["input_ids"]
    plain = base.eval()
    task = "SEQ_CLS" if case.backbone == "minilm" else "CAUSAL_LM"
    phi = PhiConfig(task_type=task, r=case.rank, num_basis=50)
    merged = peft.get_peft_model(copy.deepcopy(base), phi).merge_and_unload().eval()
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (plain, merged)]
    assert kinds[0] == kinds[1], "a merged model has other modules than the plain one"

    @torch.no_grad()
    def run(model: PreTrainedModel) -> tuple[float, float]:
        if case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds, _ = timed(lambda: model(input_ids=tokens), case.device, 5)
        used = torch.cuda.max_memory_allocated() - before if case.device.type == "cuda" else 0
        return seconds, used / 2**30

    rounds = [(run(plain), run(merged)) for _ in range(5)]
    ratio = statistics.median(second[0] / first[0] for first, second in rounds)
    print(f"merged inference: {ratio:.3f} × the plain model's time", end="")
    print(f"; working memory {rounds[-1][1][1]:.2f} GiB, plain {rounds[-1][0][1]:.2f}" if rounds[0][0][1] else "")


def gemm_rate() -> float:
    """Multiply-adds × 2 per second of a large bfloat16 product on random data."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - began)


def axes(given: argparse.Namespace) -> list[Case]:
    """A case for every combination of the options with several values."""
    small = given.backbone == "minilm"
    ranks = given.rank or [4 if small else 16]
    cases = []
    for shape, rank, *ways in itertools.product(given.batch, ranks, given.checkpointing, given.graph, given.autocast):
        batch, _, tokens = shape.partition("x")
        length = int(tokens or given.tokens or (32 if small else 512))
        cases.append(Case(given.backbone, int(batch), length, rank, *(way == "yes" for way in ways)))
    return cases


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=["minilm", "qwen2-0.5b", "llama3-8b"])
    parser.add_argument("--batch", nargs="+", default=["16"], help="16, or with its tokens 16x512")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rank", type=int, nargs="+")
    for name, text in (
        ("checkpointing", "of every block"),
        ("graph", "every method's step as one CUDA graph"),
        ("autocast", "weights in float32, products in bfloat16"),
    ):
        parser.add_argument(f"--{name}", choices=["no", "yes"], nargs="+", default=["no"], help=text)
    parser.add_argument("--compile", choices=["no", *BLOCKWISE, "whole"], nargs="+", default=["no"])
    parser.add_argument("--busy", action=argparse.BooleanOptionalAction, default=True, help="how long the GPU works")
    parser.add_argument("--recorded", action="store_true", help="record the compilation of φ, see phi/recorded.py")
    parser.add_argument("--methods", default="", help="parts of names, separated by semicolons; LoRA is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new row is begun")
    return parser.parse_args(arguments)


def main() -> None:
    """Check, then time."""
    given = parse()
    if given.recorded:
        choice.RECORD_AFTER = 3
    deadline = time.monotonic() + given.budget
    turns = Turns(given.methods.split(";"), given.compile, given.rounds, given.steps, deadline)
    for name, value in environment().items():
        print(f"{name}: {value}")
    cases = axes(given)
    base = cases[0].base()
    rate = gemm_rate() if cases[0].device.type == "cuda" else math.nan
    tables = []
    for case in cases:
        print(f"\n{case}", flush=True)
        case.prepare(base)
        tables.append(measure(case, base, turns))
        report(case, tables[-1])
    if not given.busy or turns.late():
        return
    cases[0].prepare(base)
    merged_inference(cases[0], base)
    if cases[0].device.type == "cuda":
        for case, results in zip(cases, tables, strict=True):
            print(f"\n{case}")
            case.prepare(base)
            report_busy(case, base, results, rate, turns)


if __name__ == "__main__":
    main()
