"""Cells drawn at random from the results, run again from what was recorded of them, and held against it.

    python benchmarks/repeat.py draw --cells 20 --seed 1 > again.jsonl
    python -m basisadapt.training again.jsonl --output results.jsonl --brief    # --data-dir where the cells need it
    python benchmarks/repeat.py compare results.jsonl

The second command runs on the machine that is to be tried. The third prints a table: the score then and now, the
largest relative difference of the two losses, and beside them how far the scores of the row's seeds scatter.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

CELLS = Path(__file__).parents[1] / "studies" / "results" / "cells"
LOSSES = ("train_loss", "eval_loss")


def read(path: Path) -> list[str]:
    """The lines of a file, packed or not."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Every result of the campaign, in an order that does not depend on the files."""
    lines = {line for path in folder.glob("*.jsonl.gz") for line in read(path)}
    return [json.loads(line) for line in sorted(lines)]


def draw(folder: Path, count: int, seed: int) -> None:
    """Print the lines of some cells."""
    for line in random.Random(seed).sample(recorded(folder), count):
        print(json.dumps({name: line[name] for name in ("study", "row", "key", "config")}, ensure_ascii=False))


def score(line: dict[str, Any]) -> float:
    """The score of a result; NaN if the run diverged."""
    return float(line["result"]["metrics"].get(line["result"]["headline"], float("nan")))


def compare(folder: Path, results: Path) -> None:
    """Print the table, and how far scores and evaluation losses are apart."""
    known = recorded(folder)
    then = {line["key"]: line for line in known}
    print("| study | row | seed | score | again | losses differ by | the row's seeds scatter by | device | again |")
    print("|---|---|---:|---:|---:|---:|---:|---|---|")
    same, changes, losses = 0, [], []
    lines = [json.loads(text) for text in read(results)]
    for line in lines:
        old = then[line["key"]]
        mates = [score(other) for other in known if (other["study"], other["row"]) == (line["study"], line["row"])]
        scatter = f"{statistics.stdev(mates):.4f}" if len(mates) > 1 else "–"
        metrics = old["result"]["metrics"], line["result"]["metrics"]
        apart = max(abs(metrics[1][name] / metrics[0][name] - 1) for name in LOSSES if name in metrics[0])
        devices = " | ".join(each["result"]["environment"]["device"].removeprefix("NVIDIA ") for each in (old, line))
        same += f"{score(old):.4f}" == f"{score(line):.4f}"
        changes.append(score(line) - score(old))
        losses.append(abs(metrics[1]["eval_loss"] - metrics[0]["eval_loss"]))
        print(
            f"| {line['study']} | {line['row']} | {line['config']['seed']} | {score(old):.4f} | {score(line):.4f} "
            f"| {apart:.0e} | {scatter} | {devices} |"
        )
    commits = {line["result"]["environment"]["git_commit"][:7] for line in lines}
    if len(changes) > 1:
        mean, deviation = statistics.mean(changes), statistics.stdev(changes)
        print(f"\nscores: {mean:+.4f} ± {deviation:.4f} (mean, deviation); evaluation losses: {max(losses):.4f}")
    print(f"\n{same} of {len(lines)} scores are the same to four digits; run again at {', '.join(sorted(commits))}.")


def main() -> None:
    """Draw or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, default=CELLS, metavar="DIR", help="files *.jsonl.gz")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="print lines of cells")
    drawing.add_argument("--cells", type=int, default=10)
    drawing.add_argument("--seed", type=int, default=1)
    commands.add_parser("compare", help="print a table").add_argument("results", type=Path)
    options = parser.parse_args()
    if not options.folder.is_dir():
        sys.exit(f"--from {str(options.folder)!r} is no folder")
    if options.command == "draw":
        draw(options.folder, options.cells, options.seed)
    else:
        compare(options.folder, options.results)


if __name__ == "__main__":
    main()
