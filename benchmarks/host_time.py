"""The host's time of a step of φ and of LoRA, in a toy whose layers leave it nothing else to do.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--blocks 8] [--rounds 9] [--backend aot_eager]

Blocks of seven layers 32 × 32, r = 2, 4 tokens, N = 8; in bfloat16 on a GPU, if there is one. On a CPU, φ is chosen as
on a GPU, where the host does not wait and tables are made together, and the fused kernels are left out: they return
what memory held. Times are CPU time, medians over rounds in which the columns take turns. A step is a forward and a
backward pass after all that trains has moved, launched one by one, or with every block compiled by torch (aot_eager
traces and differentiates as inductor does, and fuses nothing). φ is compiled once a step, and once in VERIFY_EVERY
steps also chosen anew; "calls" are those of torch's operators. The operators of a compiled layer are timed as its graph
calls them, and without what torch does around them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from basisadapt.adapter import PhiConfig, PhiLinear
from basisadapt.core.environment import environment
from basisadapt.phi import choice, extent, kernels, operators, sums
from basisadapt.phi.compiler import Compiled, Compiler
from basisadapt.phi.evaluators import Evaluator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # of the frozen weights
LAYERS, SIDE, RANK, TOKENS, TIMES = 7, 32, 2, 4, 50
COMMON: dict[str, Any] = {"r": RANK, "target_modules": r".*layers\.\d"}
METHODS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(**COMMON),
    "φ, series": PhiConfig(num_basis=8, **COMMON),
    "φ, tables": PhiConfig(num_basis=8, preset="nyquist", gain=400.0, **COMMON),
}


class Block(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """x through all layers."""
        for layer in self.layers:
            x = layer(x)
        return x


class Toy:
    """A model with a method's adapter, whose blocks `backend` compiles."""

    def __init__(self, method: peft.PeftConfig, blocks: int, backend: str | None = None) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(*(Block() for _ in range(blocks))).to(DEVICE, DTYPE)
        self.model = peft.get_peft_model(base, method)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.x = torch.randn(1, TOKENS, SIDE, device=DEVICE, dtype=DTYPE, requires_grad=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "_B" in name or name.endswith("alpha"):
                    parameter.normal_().mul_(0.2)
        for block in base if backend else ():
            block.compile(backend=backend, fullgraph=True)
        self.step()

    def move(self) -> None:
        """As an optimizer moves what trains."""
        with torch.no_grad():
            torch._foreach_mul_(self.trained, 1 + 1e-6)

    def step(self) -> float:
        """The time of a forward and a backward pass, in which φ is not chosen anew."""
        self.move()
        for layer in self.adapted[:1]:
            _due(layer.phi_source["default"], False)
        return seconds(lambda: torch.autograd.grad(self.model(self.x).sum(), [self.x, *self.trained]))

    @property
    def adapted(self) -> list[PhiLinear]:
        """The layers with φ."""
        return [module for module in self.model.modules() if isinstance(module, PhiLinear)]


class Phi(Toy):
    """The parts of a step that φ alone has."""

    def compile(self, anew: bool) -> Compiled:
        """Compile φ of all layers, and choose its evaluators `anew` or not."""
        self.move()
        compiler: Compiler = self.adapted[0].phi_source["default"]
        _due(compiler, anew)
        made = compiler.refresh()
        compiler._in_call.compiled = made
        return made

    def seconds_back(self) -> float:
        """The time of the backward pass of φ's compilation, from the gradients that the layers leave."""
        made = self.compile(anew=False)
        outputs = [parameter for function in made.functions.values() for parameter in function.evaluator.parameters]
        gradients = [torch.zeros_like(output) for output in outputs]
        return seconds(lambda: torch.autograd.backward(outputs, gradients))

    def operators(self) -> dict[str, Callable[[], object]]:
        """Calls of the second layer's operators by a graph, and without torch's part."""
        made, layer = self.compile(anew=False), self.adapted[1]
        A, B = layer.phi_A["default"].detach(), layer.phi_B["default"].detach()
        row, key = made.linked[1].row, made.linked[1].key
        x, W = self.x.detach(), layer.base_layer.weight.detach()
        forward, pull = (x, W, None, A, B, row.detach(), key), (x, x, W, A, B, key, True, False)

        def pulled(by: Callable[..., tuple[Tensor, ...]]) -> None:
            made.functions[layer.name].take(by(*pull)[-1])  # else a table's gradients would add up

        return {
            "forward operator of a layer": partial(torch.ops.basisadapt.linear.default, *forward),
            "forward operator, its own part": partial(operators._linear, *forward),
            "pullback of a layer": partial(pulled, torch.ops.basisadapt.linear_backward.default),
            "pullback, its own part": partial(pulled, operators._linear_backward),
        }


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call."""
        self.count += 1
        return function(*args, **(kwargs or {}))


def _due(compiler: Compiler, anew: bool) -> None:
    compiler._choice._count = 0 if anew else 1


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """The CPU time of `work`, the mean of so many calls."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def counted(toy: Phi, anew: bool) -> int:
    """The number of calls of a compilation of φ."""
    with Calls() as found:
        toy.compile(anew)
    return found.count


def medians(works: dict[str, Callable[[], float]], rounds: int, unit: float) -> dict[str, str]:
    """The medians of what `works` take, in turns."""
    for _ in range(2):
        for work in works.values():
            work()
    taken = [[work() / unit for work in works.values()] for _ in range(rounds)]
    columns = map(statistics.median, zip(*taken, strict=True))
    return {name: f"{median:.1f}" for name, median in zip(works, columns, strict=True)}


def measure(blocks: int, rounds: int, backend: str) -> dict[str, dict[str, str]]:
    """What is measured, by row and method."""
    rows: dict[str, dict[str, str]] = {}
    for name, way in (("step, ms", None), (f"step, blocks by {backend}, ms", backend)):
        toys = {method: Toy(config, blocks, way) for method, config in METHODS.items()}
        rows[name] = medians({method: toy.step for method, toy in toys.items()}, rounds, 1e-3)
    ours = {method: Phi(config, blocks) for method, config in METHODS.items() if isinstance(config, PhiConfig)}
    for method, toy in ours.items():
        kinds = {type(function.evaluator).__name__ for function in toy.compile(anew=True).functions.values()}
        rows.setdefault("evaluators", {})[method] = ", ".join(sorted(kinds))
    for name, anew in (("φ compiled", False), ("φ compiled and chosen anew", True)):
        runs = {m: partial(seconds, partial(toy.compile, anew)) for m, toy in ours.items()}
        rows[f"{name}, ms"] = medians(runs, rounds, 1e-3)
        rows[f"{name}, calls"] = {method: str(counted(toy, anew)) for method, toy in ours.items()}
    rows["backward pass of it, ms"] = medians({m: toy.seconds_back for m, toy in ours.items()}, rounds, 1e-3)
    with torch.no_grad():
        parts = {method: toy.operators() for method, toy in ours.items()}
        for name in next(iter(parts.values())):
            calls = {method: partial(seconds, of[name], TIMES) for method, of in parts.items()}
            rows[f"{name}, µs"] = medians(calls, rounds, 1e-6)
    return rows


class NoKernels:
    """In place of the fused kernels."""

    @staticmethod
    def effective_weight(weight: Any, A: Tensor, B: Tensor, evaluator: Evaluator, dtype: torch.dtype) -> Tensor:
        """W + F(BA), not computed."""
        return A.new_empty(len(B), A.shape[1], dtype=dtype)

    @staticmethod
    def pull_back(
        dense: Tensor, A: Tensor, B: Tensor, evaluator: Evaluator
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The gradients, not computed."""
        return torch.empty_like(A), torch.empty_like(B), (torch.empty_like(evaluator.parameters[0]),)


def as_on_a_gpu() -> None:
    """On a CPU, do what the host does beside a GPU."""
    kernels._fused = lambda *_: NoKernels
    choice.deferred = lambda _: True
    choice._send = lambda numbers: (numbers.clone(), choice._arrived)
    choice.largest = lambda pairs: extent._at_once(pairs, extent.MEASURED_AT_ONCE_ELSEWHERE)
    sums.AT_ONCE["cpu"] = sums.AT_ONCE_ELSEWHERE


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="of seven layers each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile (%(default)s)")
    options = parser.parse_args()
    for name, value in environment().items():
        print(f"{name}: {value}")
    if DEVICE.type == "cpu":
        as_on_a_gpu()
    rows = measure(options.blocks, options.rounds, options.backend)
    print(f"\n| {LAYERS * options.blocks} layers | " + " | ".join(METHODS) + " |\n|---|" + "---:|" * len(METHODS))
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(found.get(method, "") for method in METHODS) + " |")


if __name__ == "__main__":
    main()
