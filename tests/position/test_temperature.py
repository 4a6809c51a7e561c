"""Query temperature against the attention of Ministral 3 and Llama 4 in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from differences import assert_near
from jsonargparse import ArgumentParser

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.checkpoint.description import describe_layers, read_layers
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.attention import attention_backend
from lit_longctx.model.keys import OWN
from lit_longctx.model.layers import LayerKind, LayerPattern, Layers
from lit_longctx.model.llama import Attention
from lit_longctx.position import NoPE, QueryTemperature, YaRN

transformers = pytest.importorskip("transformers")
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


@torch.no_grad()
def test_a_model_is_ministral_3():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0}
    rope |= {"mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7}
    rope["original_max_position_embeddings"] = 16
    config = transformers.Ministral3Config(
        **SHAPE, max_position_embeddings=64, rope_parameters=rope, pad_token_id=None
    )
    theirs = transformers.Ministral3ForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    yarn = YaRN(1e4, factor=4, original_context=16, mscale=1.0, mscale_all_dim=1.0)
    ids = torch.randint(3, 97, (2, 64))
    expected = theirs(ids).logits
    for temperature, same in ((QueryTemperature(16, 0.7), True), (None, False)):
        kind = LayerKind(yarn, query_temperature=temperature)
        ours = Llama(LlamaConfig(**SHAPE, rms_norm_eps=1e-5), Layers((kind,), (0, 0)))
        ours.load_state_dict(theirs.state_dict())
        found = ours.logits(reading(ids))
        if same:
            assert_near("query temperature: logits, Ministral 3", found, expected, atol=1e-5)
        assert torch.allclose(found[:, 16:], expected[:, 16:], atol=1e-3) == same


@torch.no_grad()
def test_a_layer_without_positions_is_llama_4s():
    config = transformers.Llama4TextConfig(
        **SHAPE,
        no_rope_layers=[0, 0],
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.3,
        attn_implementation="eager",
    )
    theirs = Llama4TextAttention(config, 0)
    kind = LayerKind(NoPE(), query_temperature=QueryTemperature(8, 0.3, offset=1))
    backend = attention_backend("sdpa")
    ours = Attention(LlamaConfig(**SHAPE), kind.position, backend)
    ours.load_state_dict(theirs.state_dict())
    batch = reading(torch.randint(3, 97, (2, 40)))
    x = torch.randn(2, 40, 48)
    view = OWN.views(batch, [kind], backend, 12)[0]
    found = ours(x, 40, view, OWN.layer(0))
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=None, attention_mask=mask)
    assert_near("query temperature: attention, Llama 4", found, expected, atol=1e-6)


HOTTER = LayerKind(NoPE(), 8, QueryTemperature(floor_scale=4))


def test_it_is_described_read_and_told():
    layers = Layers((LayerKind(NoPE()), HOTTER), (0, 1))
    described = describe_layers(layers)
    assert read_layers(described, LlamaConfig(**SHAPE)) == layers
    kinds = described["layers"]["kinds"]
    assert kinds[0].keys() == {"position", "window"}  # as before there was one
    told = "QueryTemperature(floor_scale=4, attn_scale=0.1, offset=0)"
    assert str(layers) == f"1 × NoPE(), 1 × NoPE() in windows of 8 with {told}"
    hotter = LayerKind(NoPE(), query_temperature=HOTTER.query_temperature)
    uniform = Layers((hotter,), (0, 0))
    assert read_layers(describe_layers(uniform), LlamaConfig(**SHAPE)) == uniform


def test_an_export_is_refused_by_name(tmp_path: Path):
    llama = Llama(LlamaConfig(**SHAPE), LayerPattern(["hotter"], {"hotter": HOTTER}))
    message = "Llama has no query temperature; train without one, or keep the run folder"
    with pytest.raises(ValueError, match=message):
        export_pretrained(llama, tmp_path / "out")


def test_a_config_says_it_of_a_kind_of_layers():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--position", type=LayerPattern)
    kinds = {"hotter": {"position": "NoPE", "query_temperature": {"floor_scale": 8, "offset": 1}}}
    read = parser.parse_object({"position": {"layers": ["hotter"], "kinds": kinds}})
    kind = parser.instantiate(read).position.kinds["hotter"]
    assert kind == LayerKind(NoPE(), query_temperature=QueryTemperature(8, offset=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"floor_scale": 0}, "floor_scale must be 1 or more tokens; got 0"),
        (
            {"floor_scale": 8, "attn_scale": float("nan")},
            "attn_scale must be finite and 0 or more; got nan",
        ),
        ({"floor_scale": 8, "offset": 2}, "offset must be 0 or 1; got 2"),
    ],
)
def test_what_gives_no_factor_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        QueryTemperature(**given)
