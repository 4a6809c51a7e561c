"""Against numbers of the original implementation (see tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from differences import assert_near
from einops import rearrange
from safetensors.torch import load_file

from lit_longctx.batch import one_document
from lit_longctx.model import Attention, LlamaConfig
from lit_longctx.model.attention import attention_backend
from lit_longctx.model.keys import OwnLayer, View
from lit_longctx.position import TransformerXL

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_xl_attention.safetensors"
HEADS, DIM, WIDTH = 4, 16, 64


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("key", "memory"), [("", 0), ("_with_memory", 20)])
@torch.no_grad()
def test_the_original_layer(golden, name, key, memory):
    config = LlamaConfig(1, WIDTH, 1, 1, HEADS)
    scheme = TransformerXL(distance_dim=WIDTH)
    backend = attention_backend(name)
    layer = Attention(config, scheme, backend)
    for projection, weight in (
        ("q_proj", "wq"),
        ("k_proj", "wk"),
        ("v_proj", "wv"),
        ("o_proj", "wo"),
    ):
        getattr(layer, projection).weight.copy_(golden[weight])
    layer.position.content_bias.copy_(golden["u"])
    layer.position.position_bias.copy_(golden["v"])
    by_head = rearrange(golden["wr"], "(head dim) place -> head dim place", head=HEADS)
    layer.position.distance_weight.copy_(by_head)

    past = rearrange(golden["memory"], "time batch width -> batch time width")[:, :memory]
    now = rearrange(golden["x"], "time batch width -> batch time width")
    x = torch.cat([past, now], dim=1)
    code = scheme.encode(torch.arange(-memory, now.shape[1]).expand(2, -1), DIM)
    mask = backend.prepare(one_document(2, now.shape[1]), one_document(2, x.shape[1]))
    out = layer(x, now.shape[1], View(code, mask), OwnLayer())
    found = rearrange(out, "batch time width -> time batch width")
    # the golden float32 numbers themselves are 6e-6 away from float64
    what = f"TransformerXL: output{key.replace('_', ' ')}, original code, {name}"
    assert_near(what, found, golden[f"out{key}"], atol=1e-5, rtol=1e-5)


def rel_shift_scores(q, k, u, v, w, theta):
    """Dai et al. 2019, appendix B, as published: scores by distance, then every row shifted."""
    length, dim = q.shape[0], w.shape[-1]
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    angles = torch.outer(distance, theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    r = torch.cat([angles.sin(), angles.cos()], -1) @ w.T
    by_distance = torch.cat([torch.zeros(length, 1, dtype=torch.float64), (q + v) @ r.T], 1)
    shifted = by_distance.view(length + 1, length)[1:].view(length, length)
    return ((q + u) @ k.T + shifted).tril()


@pytest.mark.parametrize("distance_dim", [8, 16, 64])
def test_factored_scores_equal_rel_shift(distance_dim):
    layer = TransformerXL(distance_dim=distance_dim).layer(1, 16).double()
    parameters = {name: torch.nn.init.normal_(p) for name, p in layer.named_parameters()}
    q, k = torch.randn(2, 300, 16, dtype=torch.float64)
    code = TransformerXL(distance_dim=distance_dim).encode(torch.arange(300)[None], 16)
    wide_q, wide_k = layer(q[None, :, None], k[None, :, None], code)
    found = torch.einsum("bqhd,bkhd->qk", wide_q, wide_k).tril()
    u, v, w = (parameters[n][0] for n in ("content_bias", "position_bias", "distance_weight"))
    expected = rel_shift_scores(q, k, u, v, w, 10_000.0)
    scale = expected.abs().max()
    what = "TransformerXL: scores over the largest, rel_shift in float64"
    assert_near(what, found / scale, expected / scale, atol=1e-5)
