"""The batches of a run: texts of like length, and of mixed ones."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from basisadapt import InputError
from basisadapt.tasks import CompletionTask, Rows, TaskData
from basisadapt.tasks.completion import Continuation, Probe, Question, response_loss, teacher_forced
from basisadapt.training import plan, run
from basisadapt.training.trainer import MixedBatches
from tests.short_runs import config


def test_batches_of_like_length_come_in_any_order():
    size, lengths = 8, list(range(1, 131))
    torch.manual_seed(0)
    sampler = MixedBatches(LengthGroupedSampler(size, lengths=lengths), size)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(len(sampler)))
    assert first != second

    def means(rows):
        batches = [[lengths[row] for row in rows[at : at + size]] for at in range(0, len(rows), size)]
        assert [len(batch) for batch in batches] == [size] * 16 + [2]
        assert all(max(batch) - min(batch) < 2 * 32 for batch in batches[:-1])
        return [statistics.fmean(batch) for batch in batches[:-1]]

    spread = [statistics.pstdev(means(rows)) for rows in (first, second, list(range(len(lengths))))]
    assert min(spread[:2]) > 0.9 * spread[2], "the batches' mean lengths differ nearly as much as those of sorted rows"
    assert means(first) != sorted(means(first), reverse=True)


def test_batches_of_like_length_leave_the_answers_with_their_rows(small):
    one, other = (
        run(small(method="frozen", train={"eval_rows": 80, "group_by_length": which})) for which in (False, True)
    )
    assert one.metrics["accuracy"] == other.metrics["accuracy"]
    assert one.metrics["generalisation_gap"] == other.metrics["generalisation_gap"]


def test_like_lengths_train_the_same_rows(small):
    one, other = (run(small(task="docstrings", train={"group_by_length": which})) for which in (False, True))
    assert one.data["train_rows"] == other.data["train_rows"]
    assert one.metrics["tokens_per_second"] > 0
    assert one.curves["loss"] != other.curves["loss"]


@pytest.mark.parametrize("values", [{"processes": 2}])
def test_like_lengths_are_refused_where_they_cannot_be(values):
    with pytest.raises(InputError, match=r"train\.group_by_length must be false with several train\.processes"):
        config(train={"group_by_length": True, **values})
    with pytest.raises(InputError, match=r"train\.group_by_length is for texts"):
        plan(config(task="vision/fashion_mnist", backbone="dinov2-base", train={"group_by_length": True}), dry=True)


class MixedLengths(CompletionTask, name="test/mixed_lengths"):
    """Texts of 30 to 190 bytes, lengths of 64 modulo 128 among them."""

    headline = "loss"

    def check(self, data_dir):
        """They are made here."""

    def load(self, data_dir):
        draw = random.Random(0)
        prompts = [Question("".join(draw.choices("abcdefgh ", k=draw.randrange(30, 190)))) for _ in range(600)]
        return TaskData(Rows(prompts, [question.prompt[:3] for question in prompts]), Rows(prompts[:8], ["a"] * 8))

    def probe(self, question, response):
        return Probe(question.prompt, (Continuation(response),))

    def score(self, model, batch):
        log_probs, _ = teacher_forced(model, batch)
        return response_loss(log_probs, batch), log_probs.sum(-1)

    def measure(self, scores, rows, processor):
        return {"loss": -float(scores.mean())}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_batches_of_mixed_lengths_stay_finite_in_bf16(method, packed, language_model):
    steps = 1000 if torch.cuda.is_available() else 30  # cuDNN's attention gave a gradient of NaN in 3 batches of 41
    train = {"precision": "bf16", "max_steps": steps, "train_rows": 600, "batch_size": 8, "lr": 1e-3}
    chosen = {"task": "test/mixed_lengths", "backbone": str(language_model), "method": method}
    result = run(config(**chosen, train=train, data={"packed": packed}))
    assert result.status == "finished"
    assert result.curves["loss"][-1][1] < result.curves["loss"][0][1]
    assert result.metrics["tokens_per_second"] > 0
