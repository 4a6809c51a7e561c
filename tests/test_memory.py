"""With a memory that reaches far enough, windows give what one pass over everything gives."""

from dataclasses import replace

import pytest
import torch

from lit_longctx.batch import pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.memory import Memory
from lit_longctx.position import RoPE, TransformerXL, XPos

SHAPE = LlamaConfig(97, 48, 80, 3, 4, 2)


def tiny(position, attention="sdpa"):
    llama = Llama(SHAPE, position, attention)
    for name, parameter in llama.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return llama


def stream(rows, tokens, seed=0):
    """Rows of documents, some within a window, some over several, one begins just at a window."""
    ids = torch.randint(3, 97, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    for place in (3, 8, 20):
        ids[0, place % tokens] = 1
    ids[1, 30 % tokens] = 1
    return ids


SCHEMES = [RoPE(), TransformerXL(distance_dim=8), XPos()]


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("position", SCHEMES, ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_windows_with_memory_equal_the_whole(position, attention):
    llama = tiny(position, attention)
    ids = stream(3, 40)
    whole = llama(pack(ids, bos=1))
    memory = Memory(tokens=40)
    for begin in range(0, 40, 8):
        batch = pack(ids[:, begin : begin + 9], bos=1)
        _, nats = llama.loss(batch, memory)
        torch.testing.assert_close(nats, whole[:, begin : begin + 8], atol=3e-5, rtol=0)


@torch.no_grad()
def test_a_short_memory_sees_no_farther_than_it_is_long():
    """One layer, memory of 8: window 3 must not change when a token of window 1 does."""
    llama = Llama(replace(SHAPE, num_hidden_layers=1), TransformerXL())
    for parameter in llama.parameters():
        parameter.normal_(0.1, 0.15)
    ids = torch.randint(3, 97, (1, 25))

    def third(ids):
        memory = Memory(tokens=8)
        for begin in (0, 8, 16):
            _, nats = llama.loss(pack(ids[:, begin : begin + 9], bos=1), memory)
        assert memory.length == 8
        return nats

    first, second = ids.clone(), ids.clone()
    first[0, 5] = 3 if ids[0, 5] != 3 else 4
    second[0, 13] = 3 if ids[0, 13] != 3 else 4
    assert torch.equal(third(first), third(ids))
    assert not torch.equal(third(second), third(ids))


def test_no_gradient_flows_into_the_past():
    llama = tiny(TransformerXL())
    memory = Memory(tokens=16)
    ids = stream(2, 16)
    llama.loss(pack(ids[:, :9], bos=1), memory)
    assert not any(x.requires_grad for x in memory.hidden)
    loss, _ = llama.loss(pack(ids[:, 8:17], bos=1), memory)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in llama.parameters())
