"""A step by bandwidth and gain on a GPU: φ's time at the Nyquist bandwidth over its own at ω = 1.

    python benchmarks/cliff_gpu.py [--functions 50 512] [--bases sinc] [--gains 1 30 300 1000] [--profile]

The adapted layers of Qwen2-0.5B, 24 blocks of seven, in bfloat16 with r = 16, each on 512 tokens of its own; max |BA| =
0.1 in every layer, B and α drawn, ω spread by a percent, as training leaves it. A step is a forward and a backward pass
through all layers and AdamW. φ chooses its evaluators anew once in VERIFY_EVERY steps: its time is the mean over so
many, of the one that chooses and the median of others. In brackets are the evaluator of the first layer, S with the
terms of a series, T with the cells of a table, D for the direct sum; the largest error of some rows of its ΔW against
the direct sum, over ΔW's largest entry; and the peak of allocated memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import peft
import torch
from torch import nn

from basisadapt.adapter import PhiConfig, PhiLinear
from basisadapt.core.environment import environment
from basisadapt.phi.choice import VERIFY_EVERY
from basisadapt.phi.evaluators import Direct, Evaluator, Series, Split

BLOCKS, RANK, TOKENS, LARGEST, SPREAD = 24, 16, 512, 0.1, 0.01
SHAPES = ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864))  # out, in
BASES = ("sinc", "gaussian_rbf", "bspline", "fourier")
UNTIMED, OTHERS, ROWS = 3, 7, 32


class Layers(nn.Module):
    """The layers side by side, on frozen weights that all models share."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)

    def forward(self, inputs: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Every layer's output; inputs by their width."""
        return [layer(inputs[layer.in_features]) for layer in self.layers]


class Step:
    """A model of φ, and one training step of it."""

    def __init__(self, weights: list[torch.Tensor], **settings: object) -> None:
        torch.manual_seed(0)
        config = PhiConfig(r=RANK, target_modules=r".*layers\.\d+", **settings)
        self.model = peft.get_peft_model(Layers(weights), config)
        self._as_after_training()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, foreach=True)
        sides = {side for shape in SHAPES for side in shape}
        tokens = {side: torch.randn(TOKENS, side, device="cuda", dtype=torch.bfloat16) for side in sides}
        self.inputs = {side: x.requires_grad_() for side, x in tokens.items()}
        self.upstream = [1e-3 * tokens[len(weight)].detach() for weight in weights]

    @torch.no_grad()
    def _as_after_training(self) -> None:
        generator = torch.Generator(device="cuda").manual_seed(1)
        for module in self.adapted:
            A, B = module.phi_A["default"], module.phi_B["default"]
            B *= LARGEST / (B.normal_(generator=generator) @ A).abs().max()
        for name, parameter in self.model.named_parameters():
            if name.endswith("alpha"):
                parameter.normal_(generator=generator)
            if name.endswith("raw_omega"):
                parameter *= torch.empty_like(parameter).normal_(1.0, SPREAD, generator=generator)

    @property
    def adapted(self) -> list[PhiLinear]:
        """The layers."""
        return [module for module in self.model.modules() if isinstance(module, PhiLinear)]

    def __call__(self) -> None:
        """Forward, backward and AdamW."""
        torch.autograd.backward(self.model(self.inputs), self.upstream)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for x in self.inputs.values():
            x.grad = None

    def seconds(self) -> float:
        """The time of a step, by the host's clock."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def mean(self) -> float:
        """The mean time of VERIFY_EVERY steps; called first."""
        for _ in range(UNTIMED):
            self()
        others = [self.seconds() for _ in range(OTHERS)]
        for _ in range(VERIFY_EVERY - UNTIMED - OTHERS):
            self()
        choosing = self.seconds()
        return (choosing + (VERIFY_EVERY - 1) * statistics.median(others)) / VERIFY_EVERY

    @torch.no_grad()
    def evaluator_and_error(self) -> tuple[str, float]:
        """What evaluates the first layer, and how far some rows of its ΔW are off."""
        layer = self.adapted[0]
        A, B = layer.phi_A["default"].double(), layer.phi_B["default"][:ROWS].double()
        truth = layer.phi_source["default"].transfer(layer.name).double()(B @ A)
        error = (layer.get_delta_weight("default")[:ROWS].double() - truth).abs().max() / truth.abs().max()
        return name_of(layer.phi_source["default"].fresh(layer.name)), error.item()


def name_of(evaluator: Evaluator | Split) -> str:
    """An evaluator in short."""
    if isinstance(evaluator, Split):
        return f"{name_of(evaluator.main)} and rows apart"
    if isinstance(evaluator, Series):
        return f"S{evaluator.width}"
    return "D" if isinstance(evaluator, Direct) else f"T{evaluator.cells}"


def measured(weights: list[torch.Tensor], profile: bool, **settings: object) -> tuple[float, str]:
    """The mean time of a step, and what stands in brackets."""
    torch.cuda.empty_cache()
    step = Step(weights, **settings)
    torch.cuda.reset_peak_memory_stats()
    seconds, peak = step.mean(), torch.cuda.max_memory_allocated() / 2**30
    if profile:
        with torch.profiler.profile() as profiler:
            step()
            torch.cuda.synchronize()
        events = profiler.key_averages()
        launched = sum(event.count for event in events if "LaunchKernel" in event.key)
        print(f"\n{settings}: {launched:,} kernels launched")
        print(events.table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))
    kind, error = step.evaluator_and_error()
    return seconds, f"({kind}, {error:.0e}, {peak:.1f} GiB)"


def main() -> None:
    """Time, and check along the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", type=int, default=[50, 512])
    parser.add_argument("--gains", nargs="+", type=float, default=[1.0, 30.0, 300.0, 1000.0])
    parser.add_argument("--bases", nargs="+", default=BASES)
    parser.add_argument("--profile", action="store_true", help="and what the GPU does in a step")
    arguments = parser.parse_args()
    for name, value in environment().items():
        print(f"{name}: {value}")
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = [(0.02 * torch.randn(shape, device="cuda", generator=generator)).bfloat16() for shape in BLOCKS * SHAPES]
    print("\n| N | basis | ω = 1, gain 1, ms |" + "".join(f" Nyquist, gain {gain:g} |" for gain in arguments.gains))
    print("|---:|---|---:|" + "---:|" * len(arguments.gains))
    for num in arguments.functions:
        for basis in arguments.bases:
            settings = {"basis": basis, "num_basis": num}
            own, told = measured(weights, arguments.profile, **settings, omega_init=1.0)
            row = [f"{own * 1e3:.1f} {told}"]
            for gain in arguments.gains:
                seconds, told = measured(weights, arguments.profile, **settings, omega_init="nyquist", gain=gain)
                row.append(f"{seconds / own:.2f} {told}")
            print(f"| {num} | {basis} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
