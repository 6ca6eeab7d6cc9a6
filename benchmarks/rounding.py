"""How far bfloat16 alone moves the logits of 32 random layers: against float32, and by one unit in the last place.

    python benchmarks/rounding.py

What `several_gpus.py` allows between two models that differ in rounding only rests on this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SHARE = 0.01  # of one matrix's weights that are moved


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - truth).abs().max() / truth.abs().max()).item()


@torch.no_grad()
def measure(hidden: int) -> tuple[float, float]:
    """bfloat16 from float32, and bfloat16 from itself once some weights of the first projection have moved."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=2000,
        hidden_size=hidden,
        intermediate_size=int(3.5 * hidden),
        num_hidden_layers=32,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.arange(1, 33).unsqueeze(0)
    rounded = model(input_ids=tokens).logits.float()
    exact = model.float()(input_ids=tokens).logits
    weight = model.bfloat16().model.layers[0].self_attn.q_proj.weight
    moved = torch.rand(weight.shape) < SHARE
    weight[moved] = weight[moved] * (1 + 2**-7)
    return distance(rounded, exact), distance(model(input_ids=tokens).logits.float(), rounded)


def main() -> None:
    """Print both distances for two widths."""
    torch.manual_seed(0)
    for hidden in (512, 1024):
        from_float32, from_itself = measure(hidden)
        print(f"hidden {hidden}: {from_float32:.1e} from float32, {from_itself:.1e} by {SHARE:.0%} of one matrix")


if __name__ == "__main__":
    main()
