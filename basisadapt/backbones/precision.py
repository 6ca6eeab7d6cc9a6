"""The precision in which a frozen backbone is stored: float32, bfloat16, or quantized by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
import transformers
from torch import nn

from basisadapt.backbones.forms import HEADS
from basisadapt.core.errors import InputError

QUANTISED = ("int8", "nf4")  # LLM.int8 (Dettmers et al., 2022) and QLoRA's 4-bit NormalFloat (Dettmers et al., 2023)
WEIGHTS = ("fp32", "bf16", *QUANTISED)


def check_weights(weights: str) -> None:
    """Raise InputError if this machine cannot store weights as `weights`, one of `WEIGHTS`."""
    if weights not in QUANTISED:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"train.weights {weights} needs bitsandbytes: pip install bitsandbytes")
    from transformers.integrations import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except RuntimeError as error:
        raise InputError(
            f"train.weights {weights} needs a device that bitsandbytes supports, such as a GPU: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def loading_options(weights: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights stored as `weights`, one of `WEIGHTS`.

    In a quantized model, everything that is not quantized is in bfloat16.
    """
    if weights == "fp32":
        return {"dtype": torch.float32}
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if weights in QUANTISED:
        # It warns at every product of LLM.int8 that it converts bfloat16 to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=weights == "int8",
            load_in_4bit=weights == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[*HEADS, "lm_head"],
        )
    return options


def keep_head_exact(model: transformers.PreTrainedModel) -> None:
    """Convert the task's head, which trains, to float32; its inputs are converted too."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            head.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
