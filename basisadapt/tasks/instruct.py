"""Instruction tuning: Alpaca, and MT-Bench for models that are trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basisadapt.core.errors import InputError
from basisadapt.tasks import judge, mt_bench
from basisadapt.tasks.completion import (
    IGNORED,
    CompletionTask,
    Continuation,
    Probe,
    Question,
    generate,
    pad_left,
    response_loss,
    teacher_forced,
    token_ids,
)
from basisadapt.tasks.hub import rows_from_hub
from basisadapt.tasks.instructions import Instruction, alpaca_prompt, read_instructions
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import Example, Rows, Task, TaskData, readable_folder

HELD_OUT = 20  # one row in this many is held out
HUB = "tatsu-lab/alpaca"


class Alpaca(CompletionTask, name="instruct/alpaca"):
    """Following instructions (Taori et al., 2023): the files `instruct/alpaca*.json`, or tatsu-lab/alpaca on the hub.

    One row in twenty is held out, by a hash of its content; repeated rows count once. The metrics are teacher-forced
    and cover the held-out responses and the tokens that end them: "token_accuracy", the share of tokens that are the
    most likely one, and "perplexity", exp of the mean loss per token.
    """

    headline = "token_accuracy"
    on_hub = (HUB,)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless there is a file, or the hub is used (data_dir is None)."""
        if data_dir is not None:
            _files(data_dir)

    def load(self, data_dir: Path | None) -> TaskData:
        """The rows, sorted by their hashes. Raises InputError naming file and row, or for too few rows."""
        if data_dir is None:
            found = _from_hub()
        else:
            found = [row for path in _files(data_dir) for row in read_instructions(path)]
        rows = sorted(dict.fromkeys(found), key=_order)
        train, held_out = ([row for row in rows if (_order(row) % HELD_OUT == 0) == held] for held in (False, True))
        if not train or not held_out:
            raise InputError(f"instruct/alpaca: {len(rows)} rows are too few to hold out one in {HELD_OUT}")
        return TaskData(_rows(train), _rows(held_out))

    def probe(self, question: Any, response: str) -> Probe:
        """The response and the token that ends it, after the question's prompt."""
        return Probe(question.prompt, (Continuation(response, ends=True),))

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of `response_loss`, and for each row its correct tokens, its tokens and their loss: (rows, 3)."""
        log_probs, likeliest = teacher_forced(model, batch)
        tokens = batch["labels"] != IGNORED
        sums = [part.sum(dim=(1, 2), dtype=torch.float32) for part in (likeliest, tokens, -log_probs)]
        return response_loss(log_probs, batch), torch.stack(sums, dim=1)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """token_accuracy and perplexity over all tokens; scores: those of `score`, shape (rows, 3)."""
        right, tokens, loss = scores.sum(axis=0, dtype=np.float64)
        return {"token_accuracy": float(right / tokens), "perplexity": float(np.exp(loss / tokens))}


def _files(data_dir: Path) -> list[Path]:
    found = sorted((readable_folder(data_dir) / "instruct").glob("alpaca*.json"))
    if not found:
        raise InputError(f"data folder {str(data_dir)!r} has no instruct/alpaca*.json")
    return found


def _from_hub() -> list[Instruction]:
    part = rows_from_hub("task instruct/alpaca", HUB)["train"]
    return [Instruction(*row) for row in zip(part["instruction"], part["input"], part["output"], strict=True)]


def _order(row: Instruction) -> int:
    """A hash of the row, by which rows are shuffled and held out."""
    return int.from_bytes(hashlib.sha256(f"{row.prompt}{row.output}".encode()).digest()[:8], "big")


def _rows(instructions: Sequence[Instruction]) -> Rows:
    return Rows([Question(row.prompt) for row in instructions], [row.output for row in instructions])


class MTBench(Task, name="instruct/mt_bench"):
    """Trained on Alpaca, asked the questions of MT-Bench (`mt_bench`), and graded by the configured judge (`judge`).

    Both turns are answered in Alpaca's template, the second after the first and its answer, at the temperature that is
    published for the question's category, with at most data.max_new_tokens tokens each. The answers are saved before
    the judge is asked, so `python -m basisadapt.mt_bench` can have them judged again. The answers have no loss, and
    there is no generalization gap.
    """

    form = "completion"
    headline = "score"
    num_labels = 1
    comparable = False

    def __init__(self, settings: DataSettings | None = None) -> None:
        super().__init__(settings)
        self._alpaca = Alpaca(self.settings)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError unless Alpaca's rows, MT-Bench's files and a judge are available."""
        mt_bench.check_files(data_dir)
        self._alpaca.check(data_dir)
        judge.configured_judge()

    def load(self, data_dir: Path | None) -> TaskData:
        """Alpaca's training rows, and MT-Bench's questions with their gradings. Raises InputError."""
        return TaskData(self._alpaca.load(data_dir).train, mt_bench.read_bench(data_dir))

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """For training, Alpaca's examples; for questions, input_ids, second and temperature.

        input_ids is the prompt of the first turn, and second the tokens that follow its answer. Raises InputError for
        a conversation that could be longer than the backbone can read.
        """
        if not isinstance(rows.inputs[0], mt_bench.BenchQuestion):
            return self._alpaca.examples(rows, processor, max_length, training)
        firsts = token_ids(processor, [alpaca_prompt(question.turns[0]) for question in rows.inputs])
        seconds = token_ids(processor, [_follow_up(question.turns[1]) for question in rows.inputs], special=False)
        longest = max(len(first) + len(second) + 1 for first, second in zip(firsts, seconds, strict=True))
        if longest + 2 * self.settings.max_new_tokens > processor.model_max_length:
            raise InputError(
                f"data.max_new_tokens {self.settings.max_new_tokens} is too long: MT-Bench's questions have up to "
                f"{longest} tokens, and two answers, but the backbone reads at most {processor.model_max_length}"
            )
        return [
            {"input_ids": first, "second": [processor.eos_token_id, *second], "temperature": question.temperature}
            for first, second, question in zip(firsts, seconds, rows.inputs, strict=True)
        ]

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """For training as in `CompletionTask`; for questions, input_ids, second and temperature.

        input_ids is padded on the left, second on the right with -100; temperature has shape (rows,).
        """
        of_responses = self._alpaca.collator(processor)

        def collate(examples: list[Example]) -> dict[str, Tensor]:
            if "second" not in examples[0]:
                return of_responses(examples)
            seconds = [torch.tensor(example["second"]) for example in examples]
            return {
                **pad_left([example["input_ids"] for example in examples], processor.pad_token_id),
                "second": torch.nn.utils.rnn.pad_sequence(seconds, batch_first=True, padding_value=IGNORED),
                "temperature": torch.tensor([example["temperature"] for example in examples]),
            }

        return collate

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For questions, NaN as the loss, and the token ids of the answers, shape (rows, 2, data.max_new_tokens)."""
        if "second" not in batch:
            return self._alpaca.score(model, batch)
        answers = converse(model, batch, self.settings.max_new_tokens)
        return torch.full((), torch.nan, device=answers.device), answers

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The metrics of `mt_bench.judged`; scores: token ids, shape (rows, 2, data.max_new_tokens).

        Raises InputError, which says where the answers are saved, if the judge does not answer.
        """
        texts = [processor.batch_decode(turns, skip_special_tokens=True) for turns in scores]
        answers = [(first.strip(), second.strip()) for first, second in texts]
        saved = mt_bench.save_answers(rows, answers, judge.folder())
        chosen = judge.configured_judge()
        self.notes = {"judge": chosen.name, "answers": str(saved)}
        try:
            return mt_bench.judged(rows, answers, chosen)
        except InputError as error:
            again = f"the answers are kept: python -m basisadapt.mt_bench {saved} --data-dir DIR judges them"
            raise InputError(f"{error}; {again}") from error


def _follow_up(text: str) -> str:
    return f"\n\n### Instruction:\n{text}\n\n### Response:\n"


@torch.no_grad()
def converse(model: Any, batch: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
    """The model's answers to both turns: token ids, shape (rows, 2, max_new_tokens), padded at the end.

    They are reproducible from the seed of the run (`torch.initial_seed`), and leave its random state unchanged.
    """
    device, temperatures = batch["input_ids"].device, batch["temperature"]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed())
        first = generate(model, batch, max_new_tokens, temperatures)
        padded = pad_left(_conversations(model, batch, first), model.config.pad_token_id)
        follow_ups = {name: ids.to(device) for name, ids in padded.items()}
        second = generate(model, follow_ups, max_new_tokens, temperatures)
    return torch.stack([first, second], dim=1)


def _conversations(model: Any, batch: Mapping[str, Tensor], answers: Tensor) -> list[list[int]]:
    """The prompts of the second turn: the first prompt, its answer without the end, and the follow-up."""
    ends = model.generation_config.eos_token_id
    ends = {model.config.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
    whole = []
    rows = (batch["input_ids"], batch["attention_mask"], answers, batch["second"])
    for prompt, mask, answer, second in zip(*(part.tolist() for part in rows), strict=True):
        length = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        asked = [token for token, seen in zip(prompt, mask, strict=True) if seen]
        whole.append([*asked, *answer[:length], *(token for token in second if token != IGNORED)])
    return whole
