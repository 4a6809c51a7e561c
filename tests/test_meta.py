"""Meta's checkpoints against a Llama in Meta's own convention, written out with complex numbers."""

import json

import pytest
import torch
import torch.nn.functional as F

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.decoding import reading
from lit_longctx.position import Llama3, RoPE

DIM, LAYERS, HEADS, KV, VOCAB, HIDDEN = 32, 2, 4, 2, 50, 48


def weights():
    """Random weights under Meta's names; 2 parts of model parallelism are cut from them."""
    shapes = {"tok_embeddings": (VOCAB, DIM), "output": (VOCAB, DIM), "norm": (DIM,)}
    for i in range(LAYERS):
        block = {
            "attention.wq": (DIM, DIM),
            "attention.wk": (DIM * KV // HEADS, DIM),
            "attention.wv": (DIM * KV // HEADS, DIM),
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (HIDDEN, DIM),
            "feed_forward.w2": (DIM, HIDDEN),
            "feed_forward.w3": (HIDDEN, DIM),
            "attention_norm": (DIM,),
            "ffn_norm": (DIM,),
        }
        shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
    return {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def reference(w, ids, theta):
    """Llama as published: neighbouring pairs are complex numbers, multiplied by e^(i·angle)."""
    seq, dim = len(ids), DIM // HEADS
    angles = torch.outer(torch.arange(seq), theta ** (-torch.arange(0, dim, 2) / dim))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(seq, -1, dim // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(LAYERS):
        p = f"layers.{i}."
        y = norm(x, w[p + "attention_norm.weight"])
        q = rotate((y @ w[p + "attention.wq.weight"].T).view(seq, HEADS, dim))
        k = rotate((y @ w[p + "attention.wk.weight"].T).view(seq, KV, dim))
        v = (y @ w[p + "attention.wv.weight"].T).view(seq, KV, dim)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", scores, v).flatten(1)
        x = x + out @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = F.silu(y @ w[p + "feed_forward.w1.weight"].T)
        up = y @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate * up) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def write(folder, w, number, embedding_dim, **params):
    """Cut weights into parts as fairscale does and save them."""
    for part in range(number):
        piece = {"rope.freqs": torch.zeros(4)}
        for name, tensor in w.items():
            dim = 1 if "wo" in name or "w2" in name else 0
            dim = embedding_dim if "tok_embeddings" in name else dim
            cut = tensor if tensor.ndim == 1 else tensor.chunk(number, dim)[part].clone()
            piece[name] = cut
        torch.save(piece, folder / f"consolidated.{part:02d}.pth")
    shape = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**shape, "vocab_size": -1, **params}))


@pytest.mark.parametrize(("parts", "embedding_dim"), [(1, 0), (2, 1), (2, 0)])
@torch.no_grad()
def test_logits(tmp_path, parts, embedding_dim):
    w = weights()
    write(tmp_path, w, parts, embedding_dim, rope_theta=500.0)
    llama = load_pretrained(tmp_path)
    assert llama.position == RoPE(500.0)
    ids = torch.randint(0, VOCAB, (30,))
    found = llama.logits(reading(ids[None]))[0]
    torch.testing.assert_close(found, reference(w, ids, 500.0), atol=2e-5, rtol=1e-5)


def test_scaled_rope_is_llama_3_1(tmp_path):
    write(tmp_path, weights(), 1, 0, rope_theta=5e5, use_scaled_rope=True, vocab_size=128_256)
    llama = load_pretrained(tmp_path)
    assert llama.position == Llama3(5e5, factor=8, original_context=8192)


def test_what_is_wrong_is_named(tmp_path):
    write(tmp_path, {**weights(), "layers.0.attention.wz.weight": torch.zeros(2, 2)}, 1, 0)
    with pytest.raises(ValueError, match=r"holds layers.0.attention.wz.weight"):
        load_pretrained(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"no consolidated\.\*\.pth"):
        load_pretrained(tmp_path)
