"""Exact answers to held-out conversations: what the model reads, and when it has said enough."""

import numpy as np
import pytest
import torch

from lit_longctx.batch import one_document
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import reading
from lit_longctx.evaluation.retrieval import scoring
from lit_longctx.evaluation.retrieval.answers import last_answer
from lit_longctx.evaluation.retrieval.scoring import generated_answers, teacher_forced
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

BOS, EOS = 256, 257
SAID = [(BOS, 0), *((i, 0) for i in b"a long document, q?"), (7, 1), (8, 1), (EOS, 1)]
SAID += [(BOS, 0), *((i, 0) for i in b"q2?"), (9, 1), (10, 1), (EOS, 1)]


@pytest.fixture
def llama():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(258, 32, 64, 2, 2), RoPE()).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def test_the_last_answer_is_cut_out_with_its_end():
    ids, answers = (np.array(column) for column in zip(*SAID, strict=True))
    found = last_answer(ids, answers.astype(bool))
    assert found.answer_ids.tolist() == [9, 10, EOS]
    assert found.prompt_ids.tolist() == ids[:-3].tolist()


@pytest.mark.parametrize("eos", [EOS, BOS])
def test_all_turns_are_read_though_a_template_writes_bos_again(llama, eos):
    """Also where BOS ends a turn: against the logits of the whole conversation."""
    ids, answers = (np.array(column) for column in zip(*SAID, strict=True))
    ids[ids == EOS] = eos
    found = teacher_forced(llama, [last_answer(ids, answers.astype(bool))])[0]
    batch = reading(torch.from_numpy(ids)[None])
    assert batch.documents.boundaries.tolist() == one_document(1, len(ids)).boundaries.tolist()
    with torch.no_grad():
        logits = llama.logits(batch)[0].log_softmax(-1)
    expected = [-float(logits[-4 + i, token]) for i, token in enumerate(ids[-3:].tolist())]
    assert found.nats.tolist() == pytest.approx(expected, rel=1e-4)


def test_an_answer_ends_with_its_turn(llama, monkeypatch):
    asked = {}

    def generate(model, prompts, most, eos):
        asked.update(most=most, eos=eos)
        return torch.cat([prompts, torch.tensor([[65, 66]])], dim=1)

    monkeypatch.setattr(scoring, "generate", generate)
    ids, answers = (np.array(column) for column in zip(*SAID, strict=True))
    sample = last_answer(ids, answers.astype(bool))
    assert generated_answers(llama, ByteTokenizer(), [sample], 5, end=10) == ["AB"]
    assert asked == {"most": 5, "eos": 10}
