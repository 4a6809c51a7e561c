"""Every rope type × every shape, folder → ours → folder → transformers; and what is refused."""

import json

import pytest
import torch
from differences import assert_near

from lit_longctx.checkpoint import export_pretrained, load_pretrained, parameters
from lit_longctx.checkpoint.rope_config import read_position
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PartialRoPE,
    PositionInterpolation,
    RoPE,
    XPos,
    YaRN,
)

transformers = pytest.importorskip("transformers")

CONTEXT = 32
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
KINDS = {
    "gqa": {"num_key_value_heads": 2},
    "mha": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
    "sharded": {},
}


def lists(head_dim):
    half = head_dim // 2
    return {
        "short_factor": [1 + i / half for i in range(half)],
        "long_factor": [1 + 3 * i / half for i in range(half)],
    }


def ropes(head_dim):
    original = {"original_max_position_embeddings": CONTEXT}
    return {
        "default": {"rope_type": "default", "rope_theta": 5e5},
        "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "proportional": {
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
        "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **original},
        "yarn, every key": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            **original,
        },
        "llama3": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **original,
        },
        "longrope": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            **original,
            **lists(head_dim),
        },
    }


@torch.no_grad()
def logits(folder, length):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens(length)).logits


def tokens(length):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rope", ropes(16))
@torch.no_grad()
def test_round_trip(tmp_path, rope, kind, monkeypatch):
    head_dim = KINDS[kind].get("head_dim", 16)
    config = transformers.LlamaConfig(**SHAPE, **KINDS[kind], rope_parameters=ropes(head_dim)[rope])
    theirs = transformers.LlamaForCausalLM(config)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    theirs.save_pretrained(
        tmp_path / "theirs", max_shard_size="40KB" if kind == "sharded" else "50GB"
    )
    if kind == "sharded":
        monkeypatch.setattr(parameters, "SHARD_BYTES", 30_000)
    ours = load_pretrained(tmp_path / "theirs")
    export_pretrained(ours, tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").position == ours.position
    for length in (CONTEXT // 2, 3 * CONTEXT):
        expected = logits(tmp_path / "theirs", length)
        found = ours.logits(reading(tokens(length)))
        assert_near(f"{rope}, {kind}: our logits", found, expected, atol=1e-5, rtol=1e-5)
        again = logits(tmp_path / "ours", length)
        assert_near(f"{rope}, {kind}: transformers on our export", again, expected, atol=1e-5)


SCHEMES = {
    "RoPE": RoPE(5e5),
    "PI": PositionInterpolation(factor=4),
    "NTKAware": NTKAware(factor=4),
    "DynamicNTK": DynamicNTK(factor=2, original_context=CONTEXT),
    "YaRN": YaRN(factor=4, original_context=CONTEXT, beta_fast=16),
    "Llama3": Llama3(5e5, factor=8, original_context=CONTEXT),
    "LongRoPE": LongRoPE(factor=4, original_context=CONTEXT, **lists(16)),
}


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_an_extended_model_is_the_same_in_transformers(tmp_path, name):
    llama = Llama(LlamaConfig(**SHAPE), SCHEMES[name])
    for parameter in llama.parameters():
        parameter.normal_(0.1, 0.15)
    export_pretrained(llama, tmp_path / "out", context=4 * CONTEXT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = CONTEXT if name == "DynamicNTK" else 4 * CONTEXT
    assert config["max_position_embeddings"] == expected
    ids = tokens(4 * CONTEXT)
    found = llama.logits(reading(ids))
    theirs = logits(tmp_path / "out", 4 * CONTEXT)
    assert_near(
        f"{name}, extended: transformers on our export", theirs, found, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("rope", ropes(16))
def test_v4_and_v5_forms_agree(rope):
    v5 = ropes(16)[rope]
    rest = {key: value for key, value in v5.items() if key not in ("rope_theta", "rope_type")}
    base = {"max_position_embeddings": CONTEXT, "rope_theta": v5["rope_theta"]}
    expected = read_position({"max_position_embeddings": CONTEXT, "rope_parameters": v5})
    for key in ("rope_type", "type"):
        scaling = {key: v5["rope_type"], **rest}
        assert read_position({**base, "rope_scaling": scaling}) == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "axial"}, "rope_type 'axial' cannot be represented"),
        ({"rope_type": "default", "mystery": 1}, "rope key mystery cannot be represented"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "rope key mscale cannot"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_type": "linear"}, "factor"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, rope, message):
    config = {"model_type": "llama", **SHAPE, "rope_parameters": {"rope_theta": 1e4, **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_an_attention_factor_that_says_nothing_new_is_accepted():
    rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.138629436, "mscale": None}
    found = read_position({"max_position_embeddings": 4096, "rope_scaling": rope})
    assert found == YaRN(1e4, factor=4, original_context=4096)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            PartialRoPE(partial_rotary_factor=0.5),
            "partial_rotary_factor 0.5; train with ProportionalRoPE, or keep the run folder",
        ),
        (XPos(), "cannot represent XPos; train with a scheme that it has, or keep the run folder"),
        (
            LongRoPE(factor=4, original_context=32, unscaled_tokens=4, **lists(16)),
            "unscaled_tokens 4; train with unscaled_tokens 0",
        ),
    ],
)
def test_export_refuses_what_hugging_face_lacks(tmp_path, scheme, message):
    with pytest.raises(ValueError, match=message):
        export_pretrained(Llama(LlamaConfig(**SHAPE), scheme), tmp_path / "out")
    assert not (tmp_path / "out").exists()
