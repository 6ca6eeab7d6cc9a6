"""One training step of MiniLM (batch 16 × 32 tokens, r = 4) under LoRA, φ(BA) compiled and φ(BA) direct, in one run.

    python benchmarks/train_step.py [--rounds 7]

Forward, backward and AdamW; dropout off. The methods take turns, so that a slow moment of the machine hits all; the
figure is the median over rounds of the ratio to LoRA's step in the same round. A and B are set to the size that
training gives them, φ's amplitudes are drawn. Before anything is timed, the compiled layer is held against the direct
one: where they differ, the error is printed and no time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from basisadapt import backbones
from basisadapt.environment import environment
from basisadapt.run_config import RunConfig
from basisadapt.training import attach

METHODS = {
    "LoRA (peft)": ("lora", {}),
    "phi, N = 8": ("phi", {"num_basis": 8}),
    "phi, N = 50": ("phi", {"num_basis": 50}),
    "phi, N = 512": ("phi", {"num_basis": 512}),
    "phi direct, N = 50": ("phi", {"num_basis": 50, "backend": "direct"}),
}
SLOW = "phi direct, N = 50"
BATCH, TOKENS, LABELS = 16, 32, 10


class Step:
    """A model with a method's adapter, and one training step of it."""

    def __init__(self, method: str, adapter: dict[str, object]) -> None:
        base, _ = backbones.load(backbones.find("minilm"), LABELS)
        torch.manual_seed(0)
        config = RunConfig.from_mapping({"method": method, "adapter": {"r": 4, **adapter}})
        self.model = attach(base, config).train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self._as_after_training()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-6)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator)
        self.labels = torch.randint(0, LABELS, (BATCH,), generator=generator)

    @torch.no_grad()
    def _as_after_training(self) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if "_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(".alpha"):
                scale = 0.5 / parameter.shape[-1]
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def __call__(self) -> torch.Tensor:
        """Forward, backward, AdamW; the logits."""
        output = self.model(input_ids=self.inputs, labels=self.labels)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.logits.detach()


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for name, value in environment().items():
        print(f"{name}: {value}")

    steps = {name: Step(*settings) for name, settings in METHODS.items()}
    first = {name: step() for name, step in steps.items()}
    error = (first["phi, N = 50"] - first[SLOW]).abs().max().item()
    print(f"\nlargest difference of logits, compiled and direct: {error:.1e}")
    if error > 1e-4:
        raise SystemExit("wrong value: nothing is timed")

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print("\n| method | step / LoRA's step, median | min | max |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        ratios = [value / lora for value, lora in zip(values, seconds["LoRA (peft)"], strict=True)]
        print(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    compiled, direct = (statistics.median(seconds[name]) for name in ("phi, N = 50", SLOW))
    print(f"\ndirect / compiled at N = 50: {direct / compiled:.1f}")


if __name__ == "__main__":
    main()
