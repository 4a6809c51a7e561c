"""LongPPL against the loops of its authors' code (PKU-ML/LongPPL) over transformers' logits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from differences import assert_near
from training import runs

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.store.windows import Windows
from lit_longctx.evaluation.loss.longppl import (
    KeyTokens,
    LongPPL,
    key_tokens,
    truncated_context_nats,
)
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

transformers = pytest.importorskip("transformers")

HOW = KeyTokens(truncated_context=64, stride=48, alpha=0.3, beta=-6.0, documents=2, tokens=250)


def llama(seed: int) -> Llama:
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(258, 32, 48, 2, 4), RoPE()).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def models() -> list[Llama]:
    return [llama(0), llama(1)]


@pytest.fixture(scope="module")
def theirs(models: list[Llama], tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("exported")
    exported = [str(export_pretrained(m, folder / str(i))) for i, m in enumerate(models)]
    load = transformers.AutoModelForCausalLM.from_pretrained
    return [load(each, dtype=torch.float32).eval() for each in exported]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    folder = tmp_path_factory.mktemp("data") / "texts"
    return Windows(runs.prepare(folder, runs.documents(seed=7, number=60)), "held_out", 256)


@torch.no_grad()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first."""
    logits = model(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def by_the_authors(model, ids: torch.Tensor, how: KeyTokens) -> list[int]:
    """Places of key tokens as `find_key_token` has them: one short window after the other."""
    full, found = losses(model, ids), []
    for begin in range(0, len(ids) - how.truncated_context, how.stride):
        first = begin + how.truncated_context
        last = min(first + how.stride, len(ids))
        short = losses(model, ids[begin:last])
        for place in range(first, last):
            loss_full, loss_short = full[place - 1], short[place - begin - 1]
            if loss_short - loss_full > how.alpha and loss_full < -how.beta:
                found.append(place)
    return found


@pytest.mark.parametrize(("truncated", "stride"), [(16, 12), (1, 1), (29, 5), (10, 40)])
def test_every_token_is_read_after_a_truncated_context(models, theirs, truncated, stride):
    rows = torch.randint(0, 258, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = truncated_context_nats(models[0], rows, truncated, stride)
    expected = torch.empty(2, 30 - truncated)
    for row, ids in enumerate(rows):
        for place in range(truncated, 30):
            begin = (place - truncated) // stride * stride
            expected[row, place - truncated] = losses(theirs[0], ids[begin : place + 1])[-1]
    assert_near("LongPPL, truncated contexts: transformers", found, expected, rtol=1e-4)


def test_longppl_is_that_of_the_authors_code(models, theirs, source):
    measure = LongPPL({"texts": source}, HOW)
    items = measure.eval_items()
    values = {
        name: [measure.measure(model, item) for item in items]
        for name, model in zip("ab", models, strict=True)
    }
    rows = [torch.from_numpy(source.read(i["begin"], i["begin"] + 250).astype(int)) for i in items]
    keys = [by_the_authors(theirs[0], ids, HOW) for ids in rows]
    section = measure.report(values, trained=250)
    assert len(rows) == 2
    assert sum(map(len, keys)) > 10
    assert not any(place < HOW.truncated_context + HOW.stride for each in keys for place in each)
    for name, model in zip("ab", theirs, strict=True):
        nats = [losses(model, ids) for ids in rows]
        found = section.results["longppl"][name]["texts"]
        every, key = (
            math.exp(torch.cat(chosen).mean())
            for chosen in (nats, [n[np.array(k) - 1] for n, k in zip(nats, keys, strict=True)])
        )
        assert found["perplexity"] == pytest.approx(every, rel=1e-5)
        assert found["longppl"] == pytest.approx(key, rel=1e-5)
        own = sum(len(by_the_authors(model, ids, HOW)) for ids in rows)
        assert found["own_key_tokens"] == own
    assert f"| texts | tokens | 498 | {sum(map(len, keys))} |" in section.tables["longppl"]


def test_a_token_gains_more_than_alpha_and_is_likelier_than_beta():
    full = torch.tensor([1.0, 1.0, 1.9, 2.0, 0.1])
    truncated = torch.tensor([3.1, 3.0, 4.0, 9.0, 0.1])
    assert key_tokens(full, truncated).tolist() == [True, False, True, False, False]
    assert key_tokens(full, truncated, alpha=1.9, beta=-3).tolist() == [
        True,
        True,
        True,
        True,
        False,
    ]


def test_where_no_token_gains_there_is_no_longppl(source):
    nats = {"full": [1.0] * 249, "truncated": [1.0] * 186}
    section = LongPPL({"texts": source}, HOW).report({"a": [nats, nats]}, trained=250)
    assert math.isnan(section.results["longppl"]["a"]["texts"]["longppl"])
    assert "| texts | a | 2.7183 | no key token |" in section.tables["longppl"]


def test_what_has_no_longer_context_is_refused(models, source, tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokens must be more than truncated_context 64; got 64"):
        KeyTokens(64, tokens=64)
    with pytest.raises(ValueError, match=r"documents, stride and truncated_context of 1 or more"):
        KeyTokens(stride=0)
    with pytest.raises(ValueError, match=r"has 8192 tokens; the longest has \d+; set --key_tokens"):
        LongPPL({"texts": source}, KeyTokens()).eval_items()
    with pytest.raises(ValueError, match=r"context of 1 to 9 tokens, below the row's 10"):
        truncated_context_nats(models[0], torch.zeros(1, 10, dtype=torch.long), 10)
