"""What a cheaper dense gradient does to the loss: the same training with it exact, in 8 bits, and sketched.

    python benchmarks/dense_gradient.py

Six blocks of Qwen2-0.5B's shapes with random weights in bfloat16 learn, through φ(BA) alone, the next token of a random
walk on 64 tokens. Same data, same seeds; per way the mean loss of the last twenty steps over three seeds. Needs a GPU.
"""

from __future__ import annotations

import statistics

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from basisadapt import backbones
from basisadapt.adapter import PhiConfig
from basisadapt.core.environment import environment

WAYS = ("exact", "fp8", "sketch:4", "sketch:16")
BATCH, TOKENS, STATES, STEPS, LAST = 8, 256, 64, 100, 20


def walks(transition: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """BATCH walks of TOKENS states."""
    state = torch.randint(STATES, (BATCH,), generator=generator)
    steps = [state]
    for _ in range(TOKENS - 1):
        state = torch.multinomial(transition[state], 1, generator=generator).squeeze(1)
        steps.append(state)
    return torch.stack(steps, 1)


def losses(way: str, seed: int) -> list[float]:
    """The loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    transition = (4 * torch.randn(STATES, STATES, generator=generator)).softmax(1)
    shapes = {**(backbones.find("qwen2-0.5b").shapes or {}), "num_hidden_layers": 6}
    torch.manual_seed(seed)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes), dtype=torch.bfloat16)
    model = peft.get_peft_model(base, PhiConfig(task_type="CAUSAL_LM", r=16, num_basis=50, dense_gradient=way)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for _ in range(STEPS):
        tokens = walks(transition, generator).cuda()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def main() -> None:
    """Train each way, print the table."""
    for name, value in environment().items():
        print(f"{name}: {value}")
    print(f"\n{STEPS} steps of {BATCH} × {TOKENS} tokens\n")
    print(f"| dense gradient | first loss | mean of the last {LAST}, three seeds | standard deviation |")
    print("|---|---:|---:|---:|")
    for way in WAYS:
        runs = [losses(way, seed) for seed in range(3)]
        last = [statistics.mean(run[-LAST:]) for run in runs]
        first = statistics.mean(run[0] for run in runs)
        print(f"| {way} | {first:.3f} | {statistics.mean(last):.3f} | {statistics.stdev(last):.3f} |", flush=True)


if __name__ == "__main__":
    main()
