"""Put tasks to a model: answers are generated, or read off one forward pass over the right ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from lit_longctx.batch import NO_TARGET, pack
from lit_longctx.data.tokens.tokenizer import Tokenizer
from lit_longctx.decoding import generate
from lit_longctx.evaluation.retrieval.prompts import TaskExample
from lit_longctx.evaluation.retrieval.tasks import Task
from lit_longctx.model import Llama


class TeacherForced(NamedTuple):
    """How a model reads one right answer."""

    exact: bool
    """Whether every token of the answer is the likeliest after those before it."""
    nats: Float[np.ndarray, " answer"]
    """−ln p of each token of the answer."""


@torch.no_grad()  # not inference mode, after which FSDP could not go on training
def teacher_forced(llama: Llama, samples: Sequence[TaskExample]) -> list[TeacherForced]:
    """Read prompts with their answers in one batched forward pass; lengths may differ.

    `exact` is what greedy decoding would give, if it had to give this tokenization of this answer,
    in this order, without a word before it: a model that says the same in other words scores 0.
    Costs no generation; the head sees the answers' positions only.
    """
    rows = [
        torch.from_numpy(np.concatenate([sample.prompt_ids, sample.answer_ids]))
        for sample in samples
    ]
    windows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    windows = windows.to(llama.head_weight.device)
    starts = torch.zeros_like(windows, dtype=torch.bool)
    starts[:, 0] = True  # a row is one document: a chat template may write BOS again
    batch = pack(windows, bos=int(samples[0].prompt_ids[0]), starts=starts)
    is_answer = torch.zeros_like(batch.labels, dtype=torch.bool)
    for row, sample in zip(is_answer, samples, strict=True):
        first = len(sample.prompt_ids) - 1  # the prompt's last token predicts the answer's first
        row[first : first + len(sample.answer_ids)] = True
    assert not (batch.labels[is_answer] == NO_TARGET).any()
    answers = batch._replace(labels=batch.labels.masked_fill(~is_answer, NO_TARGET))
    nats, top1_correct = llama.top1_correct(answers)
    lengths = [len(sample.answer_ids) for sample in samples]
    pairs = zip(top1_correct[is_answer].split(lengths), nats[is_answer].split(lengths), strict=True)
    return [TeacherForced(bool(each.all()), loss.cpu().numpy()) for each, loss in pairs]


def generated(
    llama: Llama, tokenizer: Tokenizer, task: Task, samples: Sequence[TaskExample]
) -> list[str]:
    """Answer prompts of equal length greedily; score them with `task.score(sample, answer)`.

    An answer ends after `task.max_new_tokens`, or as many tokens as the right one has if that is
    more, as with bytes.
    """
    return generated_answers(
        llama, tokenizer, samples, max(task.max_new_tokens, *(len(s.answer_ids) for s in samples))
    )


def generated_answers(
    llama: Llama,
    tokenizer: Tokenizer,
    samples: Sequence[TaskExample],
    max_new_tokens: int,
    end: int | None = None,
) -> list[str]:
    """Continue prompts of equal length greedily, by so many tokens at most or until `end` (EOS)."""
    lengths = {len(sample.prompt_ids) for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"prompts of {sorted(lengths)} tokens; generate for one length at a time")
    prompts = torch.from_numpy(np.stack([sample.prompt_ids for sample in samples]))
    eos = tokenizer.eos if end is None else end
    ids = generate(llama, prompts.to(llama.head_weight.device), max_new_tokens, eos=eos)
    return [tokenizer.decode(row.tolist()) for row in ids[:, prompts.shape[1] :].cpu()]
