"""Parameters and the memory that they take, counted from models' shapes, beside what the paper prints.

    python benchmarks/parameters.py --output studies/results/parameters

Tables 7, 11 and 25, and the memory of Table 24, all of rank 16 and N = 50. Nothing is trained and no weight is loaded.
Memory is what tensors of these sizes take, activations not counted: the frozen model in 16 bits; the adapter, its
gradients and AdamW's two moments in 32, as peft trains it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from basisadapt import backbones
from basisadapt.methods import METHODS
from basisadapt.study.plan.shipped import studies_dir
from basisadapt.training import Plan, attach, count_parameters
from basisadapt.training.config import RunConfig

RANK = 16
MODELS = {  # as the paper calls them: our name, and the form of its tasks
    "Qwen2-0.5B": ("qwen2-0.5b", "completion"),
    "Phi-3-8B": ("phi3-mini", "completion"),  # of 3.8B parameters; its width is the one that the printed counts imply
    "LLaMA3-8B": ("llama3-8b", "completion"),
    "RoBERTa-base": ("roberta-base", "text"),
}


@dataclass(frozen=True)
class Line:
    """A number of the paper and ours."""

    table: str
    backbone: str
    of: str
    unit: str
    printed: float
    counted: float


def count(backbone: str, method: str, **adapter: Any) -> Plan:
    """The parameters of a method in a backbone of the paper."""
    name, form = MODELS[backbone]
    settings = {"r": RANK, **({"preset": "paper"} if method == "phi" else {}), **adapter}
    config = RunConfig.from_mapping({"backbone": name, "method": method, "adapter": settings})
    used = METHODS[method]()
    model = attach(backbones.shape_only(backbones.find(name), form, 2), used, config, form)
    return count_parameters(model, used.parameter_groups(model, config.adapter, config.train.lr))


def printed(table: str) -> pd.DataFrame:
    """A table of the paper."""
    return pd.read_csv(studies_dir() / "paper" / f"table_{table}.csv")


def overhead() -> Iterator[Line]:
    """Tables 7 and 11: φ's parameters beside those of A and B."""
    for row in printed("07").itertuples():
        yield from _overhead("7", row, count(row.backbone, "phi"), "all modules")
    for row in printed("11").itertuples():
        yield from _overhead("11", row, count(row.backbone, "phi", placement=row.component), row.component)


def _overhead(table: str, row: Any, found: Plan, where: str) -> Iterator[Line]:
    yield Line(table, row.backbone, f"A and B, {where}", "", row.lora_params, found.factors)
    yield Line(table, row.backbone, f"φ, {where}", "", row.transfer_params, found.transfer)
    share = 100 * found.transfer / found.factors
    yield Line(table, row.backbone, f"φ over A and B, {where}", "%", row.overhead_pct, share)


def trained() -> Iterator[Line]:
    """Table 25: what each method trains."""
    for row in printed("25").itertuples():
        found = count(row.backbone, {"LR-LoRA": "phi"}.get(row.method, row.method.lower()))
        yield Line("25", row.backbone, row.method, "", row.trainable_params, found.factors + found.transfer)


def memory() -> Iterator[Line]:
    """Table 24: the memory of LR-LoRA's training, in decimal gigabytes."""
    table = printed("24_memory")
    for backbone, rows in table[table.unit != "pct"].groupby("backbone", sort=False):
        found = count(backbone, "phi")
        adapter = found.factors + found.transfer
        counted = {
            "Base model": 2 * (found.total - adapter),
            "LoRA adapters": 4 * found.factors,
            "Transfer functions": 4 * found.transfer,
            "Optimizer states": 8 * adapter,
            "Gradients": 4 * adapter,
        }
        counted["Total training"] = sum(counted.values())
        for row in rows.itertuples():
            yield Line("24", backbone, row.component, "GB", row.memory_gb, counted[row.component] / 1e9)


def shown(number: float, unit: str) -> str:
    """With the digits that matter, and the unit."""
    if unit == "GB" and number < 1e-3:
        number, unit = number * 1e6, "kB"
    return f"{number:.3g} {unit}" if unit else f"{number:,.0f}"


def to_markdown(lines: list[Line]) -> str:
    """The table."""
    rows = [
        f"| {line.table} | {line.backbone} | {line.of} | {shown(line.printed, line.unit)} "
        f"| {shown(line.counted, line.unit)} | {line.counted / line.printed:.2f} |"
        for line in lines
    ]
    head = ["| table | backbone | of | printed | counted | counted / printed |", "|---|---|---|---:|---:|---:|"]
    return "\n".join([*head, *rows]) + "\n"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write table.md and table.csv there")
    options = parser.parse_args()
    lines = [*overhead(), *trained(), *memory()]
    text = to_markdown(lines)
    if options.output is None:
        print(text)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    pd.DataFrame(lines).to_csv(options.output / "table.csv", index=False)


if __name__ == "__main__":
    main()
