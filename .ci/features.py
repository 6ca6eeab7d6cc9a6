#!/usr/bin/env python3
"""Prints what works with each method, tried here: `python .ci/features.py > docs/reference/features.md`.

A feature is a function of a model that was adapted. It compares numbers, and an AssertionError says that one is wrong.
Any other error is a refusal, which leaves the model as it was.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from basisadapt.adapter.saved import CheckedConfig
from basisadapt.core.errors import one_line
from basisadapt.methods import METHODS
from basisadapt.methods.method import PeftMethod

HEAD = """\
# What works with each method

φ, and the rivals whose layers are of this package. Each entry was tried on a small model by
`python .ci/features.py > docs/reference/features.md`: "yes" says that the numbers were right, "refused" that an error
was raised, after which the model computed as before. [Quantized weights, torch.compile, export, checkpointing,
processes](../tools.md#what-works) have tests of their own."""
INPUT = torch.linspace(-1, 1, 90, dtype=torch.float64).view(9, 10)


class Net(nn.Module):
    """Two layers to adapt, and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three numbers for each row of ten."""
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class Case:
    """An adapted model of a method, with values as training would give them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = get_peft_model(_base(), self.config()).eval()
        self.draw("default")

    def config(self, **others: Any) -> Any:
        """The method's configuration, of rank 2, with other settings."""
        return _config(self.name, **others)

    @torch.no_grad()
    def draw(self, adapter: str, seed: int = 0) -> None:
        """Values as training would give them to what trains."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if f".{adapter}" in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))

    @torch.no_grad()
    def answer(self) -> Tensor:
        """The output for INPUT."""
        return self.model(INPUT)

    def second(self) -> None:
        """Add a second adapter, and leave the first active."""
        self.model.add_adapter("other", self.config())
        self.model.set_adapter("other")
        self.draw("other", seed=1)
        self.model.set_adapter("default")


def _config(name: str, **others: Any) -> Any:
    method = METHODS[name]()
    assert isinstance(method, PeftMethod)
    common = {"task_type": None, "target_modules": ["first", "second"]}
    return method.peft_config(method.settings(r=2), {**common, **others})


def _base() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def _saving(case: Case) -> None:
    expected = case.answer()
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        _same(PeftModel.from_pretrained(_base(), folder).eval()(INPUT), expected)


def _saving_whole_modules(case: Case) -> None:
    case.model = get_peft_model(_base(), case.config(modules_to_save=["last"])).eval()
    case.draw("default")
    assert not torch.equal(case.model.base_model.model.last.weight, _base().last.weight)
    _saving(case)


def _merging(case: Case) -> None:
    expected = case.answer()
    case.model.merge_adapter()
    _same(case.answer(), expected)
    case.model.unmerge_adapter()
    _same(case.answer(), expected)


def _merging_for_good(case: Case) -> None:
    expected = case.answer()
    plain = case.model.merge_and_unload()
    assert {type(module) for module in plain.modules()} == {Net, nn.Linear}
    _same(plain(INPUT), expected)


def _merging_two(case: Case) -> None:
    case.second()
    case.model.base_model.set_adapter(["default", "other"])
    _merging(case)


def _switching(case: Case) -> None:
    first = case.answer()
    case.second()
    _same(case.answer(), first)
    case.model.set_adapter("other")
    assert not torch.allclose(case.answer(), first)
    case.model.delete_adapter("other")
    case.model.set_adapter("default")
    _same(case.answer(), first)


def _adding_up(case: Case) -> None:
    case.second()
    layer, x = case.model.base_model.model.first, INPUT
    plain, both = layer.base_layer(x), []
    for name in ("default", "other"):
        layer.set_adapter([name])
        both.append(layer(x) - plain)
    layer.set_adapter(["default", "other"])
    _same(layer(x) - plain, both[0] + both[1])


def _disabling(case: Case) -> None:
    with case.model.disable_adapter():
        _same(case.answer(), _base()(INPUT))


def _weighted(case: Case) -> None:
    case.second()
    case.model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="cat")
    raise AssertionError("no check of the sum")


def _mixing_rows(case: Case) -> None:
    first = case.answer()
    case.second()
    found = case.model(INPUT, adapter_names=["default"] * 4 + ["other"] * 5)
    _same(found[:4], first[:4])


def _hotswap(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = case.answer()
        case.model.save_pretrained(folder)
        hotswap_adapter(case.model, folder, adapter_name="default")
        _same(case.answer(), expected)


def _beside_another_tuner(case: Case) -> None:
    from peft import LoHaConfig

    model = get_peft_model(_base(), case.config(), mixed=True)
    model.add_adapter("loha", LoHaConfig(target_modules=["second"]))
    raise AssertionError("no check of the mixture")


def _injecting(case: Case) -> None:
    plain = _base()
    inject_adapter_in_model(case.config(), plain)
    _same(plain(INPUT), _base()(INPUT))


def _as_lora(case: Case) -> None:
    convert_to_lora(case.model, rank=2)
    raise AssertionError("no check of the LoRA")


def _setting(**others: Any) -> Callable[[Case], None]:
    def tried(case: Case) -> None:
        case.config(**others)
        raise AssertionError(f"no check of {others}")

    return tried


def _copying(case: Case) -> None:
    _same(copy.deepcopy(case.model)(INPUT), case.answer())


FEATURES: dict[str, Callable[[Case], None]] = {
    "saved and loaded": _saving,
    "`modules_to_save`": _saving_whole_modules,
    "`merge_adapter`, `unmerge_adapter`": _merging,
    "`merge_and_unload`": _merging_for_good,
    "two adapters merged": _merging_two,
    "several adapters, switched and deleted": _switching,
    "several adapters at once, added up": _adding_up,
    "`disable_adapter`": _disabling,
    "`add_weighted_adapter`": _weighted,
    "a batch of mixed adapters (`adapter_names`)": _mixing_rows,
    "`hotswap_adapter`": _hotswap,
    "`get_peft_model(mixed=True)`": _beside_another_tuner,
    "`inject_adapter_in_model`, before training": _injecting,
    "`convert_to_lora`": _as_lora,
    "DoRA's magnitudes (`use_dora`)": _setting(use_dora=True),
    "experts that are one tensor (`target_parameters`)": _setting(target_parameters=["experts.gate_up_proj"]),
    "a rank for each module (`rank_pattern`)": _setting(rank_pattern={"first": 1}),
    "`copy.deepcopy`": _copying,
}


def methods() -> list[str]:
    """φ, and the rivals whose layers are of this package, SineLoRA's among them."""
    peft = [name for name in METHODS if issubclass(METHODS[name], PeftMethod)]
    ours = [name for name in peft if isinstance(_config(name), CheckedConfig)]
    return ["phi", *(name for name in ours if name != "phi")]


def tried(name: str, feature: Callable[[Case], None]) -> str:
    """The error by which the method refuses the feature, empty if it works. Raises AssertionError for wrong numbers."""
    case = Case(name)
    model, expected = case.model, case.answer()
    try:
        feature(case)
    except AssertionError as error:
        raise AssertionError(f"{name}, {feature.__name__}: {error}") from error
    except Exception as error:
        why = _first_sentence(error)
    else:
        return ""
    model.set_adapter("default")
    if not torch.equal(model.eval()(INPUT), expected):
        raise AssertionError(f"{name} is not what it was after {why}")
    return why


def _first_sentence(error: Exception) -> str:
    return one_line(error).partition(". ")[0].removesuffix(".").replace("`", "").replace("|", " ")


def page(names: Iterable[str]) -> str:
    """The page, in Markdown."""
    names = list(names)
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in names)} | the error, of the first |",
        f"|---|{'---|' * len(names)}---|",
    ]
    for title, feature in FEATURES.items():
        found = [tried(name, feature) for name in names]
        cells = ["refused" if why else "yes" for why in found]
        why = next(filter(None, found), "")
        lines.append(f"| {title} | {' | '.join(cells)} | {why and f'`{why}`'} |")
    return "\n".join([HEAD, "", *lines])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(page(methods()))
