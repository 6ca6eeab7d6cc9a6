"""Tokens per second and card of many cells at once, from the file that `python -m basisadapt.training` has written.

    python -m basisadapt.study ablate_rate --preset llm --data-dir DIR --export cells.jsonl
    python -m basisadapt.training cells.jsonl --workers 14 --data-dir DIR --output results.jsonl
    python benchmarks/cells_at_once.py results.jsonl --gpus 2

Tokens are those of training, without padding. The stretch lasts from the first cell's begin to the last one's end, with
loading, evaluation and all; "training" is what as many cells would make that do nothing but train.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from basisadapt.training.execution.json_lines import ResultLine, read_lines


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="cards that the cells shared (%(default)s)")
    options = parser.parse_args()
    lines = read_lines(options.results, ResultLine, "RESULTS")
    unfinished = [line for line in lines if line.result is None or line.result["status"] != "finished"]
    if not lines or unfinished:
        print(f"no speed of cells that did not finish: {[line.row for line in unfinished] or 'none is there'}")
        return 1

    by_method: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        metrics = line.result["metrics"]
        config = line.config
        name = f"{config['method']}, {config['adapter'].get('basis', '-')}, {config['train']['precision']}"
        by_method[name].append((metrics["tokens_per_second"], metrics["seconds.train"]))
    stretch = max(line.ended for line in lines) - min(line.began for line in lines)
    at_once = sum(line.ended - line.began for line in lines) / stretch / options.gpus

    environment = lines[0].result["environment"]
    print({name: environment[name] for name in ("device", "torch", "transformers") if name in environment})
    print(f"{len(lines)} cells in {stretch:.0f} s on {options.gpus} cards, {at_once:.1f} at once on a card")
    print(f"{'method':32} {'cells':>5} {'tokens/s of one':>16} {'training, a card':>17}")
    for name, cells in sorted(by_method.items()):
        rate = statistics.median(rate for rate, _ in cells)
        print(f"{name:32} {len(cells):5} {rate:16,.0f} {rate * at_once:17,.0f}")
    tokens = sum(rate * seconds for cells in by_method.values() for rate, seconds in cells)
    print(f"all of the stretch: {tokens / stretch / options.gpus:,.0f} tokens/s a card")
    return 0


if __name__ == "__main__":
    sys.exit(main())
