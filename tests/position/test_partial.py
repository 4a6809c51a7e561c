"""Schemes that turn a part of each head, against transformers' GPT-NeoX and rope functions."""

from itertools import product

import pytest
import torch
from differences import assert_near

from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PartialRoPE, ProportionalRoPE, RoPE

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.gpt_neox import modeling_gpt_neox  # noqa: E402


def parameters(head_dim, **rope):
    return {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
    }


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_partial_rope_is_that_of_gpt_neox(share):
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": share}
    config = transformers.GPTNeoXConfig(**parameters(20, **rope))
    places = torch.tensor([[0, 1, 7, 3000], [5, 6, 7, 8]])
    q, k = torch.randn(2, 2, 2, 4, 20)  # batch, heads, seq, head_dim
    cos, sin = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)(q, places)
    expected = modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)
    scheme = PartialRoPE(5e5, partial_rotary_factor=share)
    code = scheme.encode(places, 20)
    found = scheme.layer(2, 20)(q.transpose(1, 2), k.transpose(1, 2), code)
    for name, ours, theirs in zip("qk", found, expected, strict=True):
        what = f"PartialRoPE {share}: {name}, GPT-NeoX"
        assert_near(what, ours.transpose(1, 2), theirs, atol=1e-5, rtol=1e-6)
    whole = torch.equal(code, RoPE(5e5).encode(places, 20)) if share == 1 else code.shape[-1] < 20
    assert whole


def test_proportional_rope_is_that_of_transformers():
    for head_dim, share, factor in product((20, 64, 80), (0.25, 0.3, 0.99, 1.0), (1.0, 4.0)):
        rope = {"rope_theta": 1e6, "partial_rotary_factor": share, "factor": factor}
        config = transformers.LlamaConfig(**parameters(head_dim, rope_type="proportional", **rope))
        expected, _ = ROPE_INIT_FUNCTIONS["proportional"](config, "cpu")
        scheme = ProportionalRoPE(1e6, partial_rotary_factor=share, factor=factor)
        found = scheme.frequencies(head_dim)
        assert_near("ProportionalRoPE: frequencies, transformers", found, expected, rtol=1e-6)


@pytest.mark.parametrize("scheme", [PartialRoPE, ProportionalRoPE])
@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(scheme, share):
    with pytest.raises(ValueError, match=f"above 0 and at most 1; got {share}"):
        scheme(partial_rotary_factor=share)


def test_features_that_make_no_pairs_are_refused_before_anything_is_computed():
    config = LlamaConfig(97, 40, 16, 1, 2)
    message = "partial_rotary_factor 0.25 turns 5 of 20 features; expected an even number"
    with pytest.raises(ValueError, match=message):
        Llama(config, PartialRoPE(partial_rotary_factor=0.25))
