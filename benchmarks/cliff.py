"""One layer's step by bandwidth and gain, where series grow long: φ's time over that of LoRA's layer.

    OMP_NUM_THREADS=1 python benchmarks/cliff.py [--functions 50 512] [--gains 1 30 300] [--omega nyquist]

A layer 384 × 384, r = 4, 512 tokens, in float32 on the CPU; max |BA| = 0.1, B and α drawn, ω spread by a percent, as
training leaves it. A step is a forward and a backward pass after all trained parameters have moved; its time is CPU
time, which other processes do not lengthen. φ chooses its evaluator anew once in VERIFY_EVERY steps: its time is the
mean over so many, of the one that chooses and the median of others. LoRA's steps (peft) are timed in between; ratios
are medians over rounds. In brackets are the evaluator, S with the terms of a series, T with the cells of a table, D for
the direct sum, and the largest error of y and of the gradients to x, A, B, α and ω against the direct sum, over the
largest entry of each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import peft
import torch
from cliff_gpu import BASES, LARGEST, SPREAD, TOKENS, name_of
from torch import nn

from basisadapt.adapter import PhiConfig
from basisadapt.core.environment import environment
from basisadapt.phi.choice import VERIFY_EVERY

SIDE, RANK, ROUNDS = 384, 4, 3
PATIENCE = 0.5  # seconds that steps which do not choose may take in a round


class Layer:
    """One adapted layer, and a step of it."""

    def __init__(self, config: peft.PeftConfig) -> None:
        torch.manual_seed(0)
        self.model = peft.get_peft_model(nn.Sequential(nn.Linear(SIDE, SIDE)), config)
        self.x = torch.randn(TOKENS, SIDE, requires_grad=True)
        self.upstream = torch.randn(TOKENS, SIDE)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> list[torch.Tensor]:
        """y, and the gradients to x and what trains."""
        y = self.model(self.x)
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.trained.values()], self.upstream)]

    def seconds(self) -> float:
        """The time of a step, after everything has moved a little."""
        with torch.no_grad():
            for parameter in self.trained.values():
                parameter.mul_(1 + 1e-6)
        start = time.process_time()
        self.gradients()
        return time.process_time() - start


def drawn(backend: str = "auto", **settings: object) -> Layer:
    """φ's layer, as training leaves it."""
    layer = Layer(PhiConfig(r=RANK, target_modules=["0"], backend=backend, **settings))
    generator = torch.Generator().manual_seed(1)
    trained = {name.removesuffix(".default").split(".")[-1]: p for name, p in layer.trained.items()}
    A, B = trained["phi_A"], trained["phi_B"]
    with torch.no_grad():
        trained["alpha"].normal_(generator=generator)
        spread = torch.empty_like(trained["raw_omega"]).normal_(1.0, SPREAD, generator=generator)
        trained["raw_omega"] *= spread
        B *= LARGEST / (B.normal_(generator=generator) @ A).abs().max()
    return layer


def error(layer: Layer, direct: Layer) -> float:
    """The largest error of y and the gradients, each over its largest entry."""
    pairs = zip(layer.gradients(), direct.gradients(), strict=True)
    return max(((found - truth).abs().max() / truth.abs().max()).item() for found, truth in pairs)


def chosen(layer: Layer) -> str:
    """The evaluator of the layer, in short."""
    adapted = layer.model.base_model.model[0]
    return name_of(adapted.phi_source["default"].fresh(adapted.name))


def mean_step(layer: Layer) -> float:
    """The time of a step of a new layer, by its first VERIFY_EVERY."""
    choosing, others = layer.seconds(), [layer.seconds()]
    while sum(others) < PATIENCE and len(others) < VERIFY_EVERY - 1:
        others.append(layer.seconds())
    return (choosing + (VERIFY_EVERY - 1) * statistics.median(others)) / VERIFY_EVERY


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", type=int, default=[50, 512])
    parser.add_argument("--omega", nargs="+", default=["1.0", "nyquist"])
    parser.add_argument("--gains", nargs="+", type=float, default=[1.0, 30.0, 300.0])
    arguments = parser.parse_args()
    for name, value in environment().items():
        print(f"{name}: {value}")
    lora = Layer(peft.LoraConfig(r=RANK, target_modules=["0"]))
    print(f"LoRA's layer: {min(lora.seconds() for _ in range(20)) * 1e3:.1f} ms\n")
    print("| N, ω | basis |" + "".join(f" gain {gain:g} |" for gain in arguments.gains))
    print("|---|---|" + "---:|" * len(arguments.gains))
    for num in arguments.functions:
        for omega in arguments.omega:
            start = omega if omega == "nyquist" else float(omega)
            for basis in BASES:
                cells = []
                for gain in arguments.gains:
                    settings = {"basis": basis, "num_basis": num, "omega_init": start, "gain": gain}
                    ratios = []
                    for _ in range(ROUNDS):
                        rival = statistics.median(lora.seconds() for _ in range(7))
                        ratios.append(mean_step(layer := drawn(**settings)) / rival)
                    wrong = error(drawn(**settings), drawn("direct", **settings))
                    cells.append(f"{statistics.median(ratios):.1f} ({chosen(layer)}, {wrong:.0e})")
                print(f"| {num}, {omega} | {basis} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
