"""What full fine-tuning makes of real models: their updates' spectra, and what BA, a sine and φ(BA) capture of them.

    python benchmarks/real_updates.py minilm-cola --seed 1 --data-dir DATA --output studies/results/spectra
    python benchmarks/real_updates.py --table studies/results/spectra

The first line trains all weights as CASES says, looks at every matrix of the blocks as `python -m basisadapt.spectra`
does, and writes NAME-SEED.json; the checkpoint is deleted. --matrices FILE keeps the update of every matrix of the
attention, in float32, for the targets of task `matrix/update`. The second prints a table of all such files.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from basisadapt import backbones, spectra
from basisadapt.adapter.placement import describe
from basisadapt.backbones.checkpoint import Checkpoint
from basisadapt.core.errors import InputError
from basisadapt.training import run
from basisadapt.training.config import RunConfig

ENCODER = {"lr": 5e-5, "max_steps": 300, "batch_size": 16, "eval_rows": 1000}
LANGUAGE_MODEL = {
    "lr": 1e-5,
    "epochs": 1,
    "batch_size": 32,
    "warmup_ratio": 0.1,
    "max_length": 256,
    "precision": "bf16",
}
CASES: dict[str, dict[str, Any]] = {
    "minilm-cola": {"task": "glue/cola", "backbone": "minilm", "train": ENCODER},
    "minilm-sst2": {"task": "glue/sst2", "backbone": "minilm", "train": ENCODER},
    "mpnet-cola": {"task": "glue/cola", "backbone": "all-mpnet-base-v2", "train": {**ENCODER, "lr": 2e-5}},
    "mpnet-sst2": {"task": "glue/sst2", "backbone": "all-mpnet-base-v2", "train": {**ENCODER, "lr": 2e-5}},
    "qwen-commonsense": {
        "task": "commonsense/15k",
        "backbone": "qwen2.5-coder-0.5b",
        "train": {**LANGUAGE_MODEL, "eval_rows": 800},
        "data": {"packed": True},
    },
    "qwen-alpaca": {
        "task": "instruct/alpaca",
        "backbone": "qwen2.5-coder-0.5b",
        "train": {**LANGUAGE_MODEL, "eval_rows": 200},
        "data": {"packed": True},
    },
}
RANK, FITS = 4, 24
SHARES = (f"BA, r = {RANK}, %", "sine, %", "φ, %", "best as BA of rank")
COLUMNS = ("model and task", "seed", "score", "matrices", "stable rank", "exponent", *SHARES)


def main() -> None:
    """Train and look, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="train for so many instead")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--matrices", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="DIR")
    given = parser.parse_args()
    try:
        if given.table is not None:
            for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows(given.table)):
                print(f"| {' | '.join(map(str, cells))} |")
        elif given.case is None or given.output is None:
            parser.error("give a case and --output, or --table")
        else:
            found = look(given)
            given.output.mkdir(parents=True, exist_ok=True)
            (given.output / f"{given.case}-{given.seed}.json").write_text(json.dumps(found, indent=1) + "\n")
            print("\n".join(found["verdict"]))
    except InputError as problem:
        parser.error(str(problem))


def look(given: argparse.Namespace) -> dict[str, Any]:
    """Train all weights, and say what became of them."""
    case = CASES[given.case]
    steps = {} if given.steps is None else {"max_steps": given.steps}
    config = RunConfig.from_mapping({**case, "method": "full", "train": {**case["train"], **steps}, "seed": given.seed})
    with TemporaryDirectory() as folder:
        result = run(config, data_dir=given.data_dir, save_to=Path(folder))
        if given.matrices is not None:
            keep(config.backbone, folder, given.matrices)
        updates = spectra.updates_between(config.backbone, folder, RANK, None, FITS)
    shown = ("seconds.train", "train_loss", "eval_loss", result.headline)
    return {
        "case": given.case,
        "config": config.to_mapping(),
        "headline": result.headline,
        "metrics": {name: result.metrics[name] for name in shown if name in result.metrics},
        "environment": result.environment,
        **spectra.document(updates, RANK),
    }


def keep(base_name: str, tuned_name: str, file: Path) -> None:
    """Write the updates of the attention's matrices."""
    base, tuned = (Checkpoint(backbones.find(name)) for name in (base_name, tuned_name))
    pairs = [pair for pair in spectra.pairs_of(base, tuned, None) if describe(pair[0]).kind == "attention"]
    save_file({name: (tuned.read(other).double() - base.read(name).double()).float() for name, other in pairs}, file)


def rows(folder: Path) -> Iterator[list[Any]]:
    """A line for the attention and one for the MLP of every file; what is captured is weighed by energy."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        score = found["metrics"][found["headline"]]
        for kind in ("attention", "mlp"):
            modules = [one for one in found["modules"] if describe(one["module"]).kind == kind]
            fitted = [one for one in modules if one["phi"] is not None]
            energy = [one["norm"] ** 2 for one in fitted]
            shares = [
                statistics.fmean([share(one) for one in fitted], energy)
                for share in (lambda one: one["captured"][RANK - 1], lambda one: one["sine"], lambda one: one["phi"])
            ]
            best = [spectra.rank_of(one["captured"], max(one["sine"], one["phi"])) for one in fitted]
            stable, exponent = ([one[name] for one in modules] for name in ("stable_rank", "exponent"))
            yield [
                found["case"],
                found["config"]["seed"],
                f"{100 * score:.1f}",
                f"{len(modules)} of {kind}",
                *(f"{min(x):.2f} to {max(x):.2f}" for x in (stable, exponent)),
                *(f"{100 * x:.1f}" for x in shares),
                f"{min(best)} to {max(best)}",
            ]


if __name__ == "__main__":
    main()
