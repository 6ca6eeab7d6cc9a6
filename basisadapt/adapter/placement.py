"""Which linear modules of a transformer are adapted, told from their names."""

from __future__ import annotations

import re

from basisadapt.errors import unknown
from basisadapt.phi.sharing import AdaptedModule

# The projections of a transformer block, by kind. In each: BERT and RoBERTa; Llama, Qwen2 and Phi-3; GPT-2.
KINDS = {
    "attention": (
        r"layer\.(\d+)\.attention\.(?:self\.(?:query|key|value)|output\.dense)",
        r"layers\.(\d+)\.self_attn\.(?:[qkvo]_proj|qkv_proj)",
        r"h\.(\d+)\.attn\.(?:c_attn|c_proj)",
    ),
    "mlp": (
        r"layer\.(\d+)\.(?:intermediate|output)\.dense",
        r"layers\.(\d+)\.mlp\.(?:(?:gate|up|down|gate_up)_proj)",
        r"h\.(\d+)\.mlp\.(?:c_fc|c_proj)",
    ),
}
PLACEMENTS = {"all": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


def target_pattern(placement: str) -> str:
    """The regular expression that the full names of a placement's modules match.

    Heads and poolers lie outside the blocks and never match (paper, section E.2). Raises InputError for an unknown
    placement.
    """
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    patterns = [pattern for kind in PLACEMENTS[placement] for pattern in KINDS[kind]]
    return rf"(?:.*\.)?(?:{'|'.join(patterns)})"


def describe(name: str) -> AdaptedModule:
    """The kind and the block index of a module, from its name; kind "other" and no index where no pattern matches."""
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            if match := re.fullmatch(rf"(?:.*\.)?{pattern}", name):
                return AdaptedModule(name, kind, int(match[1]))
    return AdaptedModule(name, "other", None)
