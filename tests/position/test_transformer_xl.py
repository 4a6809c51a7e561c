"""Against numbers of the original implementation (see tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from lit_longctx.attention import attention_backend
from lit_longctx.batch import one_document
from lit_longctx.position import TransformerXL

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_xl_attention.safetensors"
HEADS, DIM, WIDTH = 4, 16, 64


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("key", "memory"), [("", 0), ("_with_memory", 20)])
def test_the_original_layer(golden, name, key, memory):
    x = rearrange(golden["x"], "time batch width -> batch time width")
    past = rearrange(golden["memory"], "time batch width -> batch time width")[:, :memory]
    everything = torch.cat([past, x], dim=1)
    q, k, v = (
        rearrange(everything @ golden[w].T, "b t (h d) -> b t h d", h=HEADS) for w in ("wq", "wk", "wv")
    )
    scheme = TransformerXL(distance_dim=WIDTH)
    layer = scheme.layer(HEADS, DIM)
    with torch.no_grad():
        layer.content_bias.copy_(golden["u"])
        layer.position_bias.copy_(golden["v"])
        layer.distance_weight.copy_(rearrange(golden["wr"], "(h d) place -> h d place", h=HEADS))
        places = torch.arange(everything.shape[1]).expand(2, -1)
        q, k = layer(q, k, scheme.encode(places, DIM))
        backend = attention_backend(name)
        mask = backend.prepare(one_document(2, x.shape[1]), one_document(2, everything.shape[1]))
        context = backend.attend(q[:, memory:], k, v, mask, DIM**-0.5)
    context = rearrange(context, "b t h d -> t b (h d)")
    # the golden float32 numbers themselves are 6e-6 away from float64
    torch.testing.assert_close(context, golden[f"context{key}"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(context @ golden["wo"].T, golden[f"out{key}"], atol=1e-5, rtol=1e-5)
