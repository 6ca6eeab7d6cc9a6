"""Whether data could hold training up: tokens per second of the input pipeline alone against those of training.

    python benchmarks/input_pipeline.py                                        # the embedded default
    python benchmarks/input_pipeline.py --task glue/sst2 --data-dir DIR --max-length 128

The pipeline reads the rows, tokenises them and makes batches of them, everything anew in each round. Training takes
steps on such batches: forward, backward, clipping and AdamW, under LoRA, the cheapest of the methods to train. The two
take turns; the figures are medians over rounds. Padding counts for neither.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from basisadapt import backbones, tasks
from basisadapt.core.environment import environment
from basisadapt.methods import METHODS
from basisadapt.tasks import Task
from basisadapt.training import attach
from basisadapt.training.config import RunConfig

Batch = dict[str, Tensor]
UNTIMED = 2  # steps until memory is laid out


def tokens(batches: list[Batch]) -> int:
    """Tokens that are not padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


class Pipeline:
    """From files to batches, in stages that are timed one by one."""

    def __init__(self, config: RunConfig, task: Task, data_dir: Path | None, processor: object) -> None:
        self._config, self._task, self._data_dir, self._processor = config, task, data_dir, processor
        self.seconds: dict[str, list[float]] = {"reading": [], "tokenising": [], "collating": []}

    def batches(self) -> list[Batch]:
        """One epoch of training rows."""
        train, clock = self._config.train, [time.perf_counter()]
        rows = self._task.load(self._data_dir).train
        clock.append(time.perf_counter())
        examples = self._task.examples(rows, self._processor, train.max_length, training=True)
        clock.append(time.perf_counter())
        collate = self._task.collator(self._processor)
        parts = range(0, len(examples), train.batch_size)
        made = [collate([dict(example) for example in examples[i : i + train.batch_size]]) for i in parts]
        clock.append(time.perf_counter())
        for stage, (begin, end) in zip(self.seconds, itertools.pairwise(clock), strict=True):
            self.seconds[stage].append(end - begin)
        return made


class Training:
    """A model under the configured method, and steps of it."""

    def __init__(self, config: RunConfig, model: torch.nn.Module) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).train()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.train.lr)

    def seconds(self, batches: list[Batch]) -> float:
        """The time of a step on each."""
        begin = time.perf_counter()
        for batch in batches:
            on_device = {name: value.to(self._device) for name, value in batch.items()}
            self._model(**on_device).loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def spread(batches: list[Batch], count: int) -> Iterator[list[Batch]]:
    """`count` batches after `count` batches, round and round."""
    endless = itertools.cycle(batches)
    while True:
        yield list(itertools.islice(endless, count))


def main() -> None:
    """Time both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="docstrings")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="training steps in a round")
    options = parser.parse_args()
    train = {"max_length": options.max_length, "batch_size": options.batch_size}
    config = RunConfig.from_mapping({"task": options.task, "method": "lora", "adapter": {"r": 4}, "train": train})
    for name, value in environment().items():
        print(f"{name}: {value}")

    task = tasks.find(config.task, config.data)
    task.check(options.data_dir)
    torch.manual_seed(0)
    model, processor = backbones.load(backbones.find(config.backbone), task.form, task.num_labels)
    pipeline = Pipeline(config, task, options.data_dir, processor)
    training = Training(config, attach(model, METHODS[config.method](), config, task.form))
    parts = spread(pipeline.batches(), options.steps)
    training.seconds(next(parts)[:UNTIMED])
    for stage in pipeline.seconds.values():
        stage.clear()

    made, trained, ratios = [], [], []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        batches = pipeline.batches()
        made.append(tokens(batches) / (time.perf_counter() - begin))
        chosen = next(parts)
        trained.append(tokens(chosen) / training.seconds(chosen))
        ratios.append(made[-1] / trained[-1])

    print(f"\n{options.task}: {tokens(batches):,} tokens in {len(batches)} batches of {options.batch_size}\n")
    print("| | tokens/s, median | min | max |")
    print("|---|---:|---:|---:|")
    for name, figures in (("input pipeline alone", made), ("training, LoRA r = 4", trained)):
        print(f"| {name} | {statistics.median(figures):,.0f} | {min(figures):,.0f} | {max(figures):,.0f} |")
    print(f"\nThe pipeline is {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}).")
    stages = (f"{name} {statistics.median(seconds):.2f} s" for name, seconds in pipeline.seconds.items())
    print(f"Of an epoch: {', '.join(stages)}.")


if __name__ == "__main__":
    main()
