"""Every family × every shape: transformers' folder → ours → a step of training → transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from differences import assert_near
from torch import Tensor

from lit_longctx.batch import pack
from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.checkpoint.families import FAMILIES
from lit_longctx.decoding import decode, reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import NoPE, QueryTemperature, RoPE, YaRN

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 20},
    "eps": {"rms_norm_eps": 1e-3},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
OWN_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"bias": {"attention_bias": True}},
    "mistral": {"window": {"sliding_window": 5}, "no window": {"sliding_window": None}},
    "ministral3": {
        "rope and window": {
            "sliding_window": 5,
            "rope_parameters": {
                **PLAIN,
                "llama_4_scaling_beta": 0.2,
                "original_max_position_embeddings": 16,
            },
        },
    },
    "qwen2": {
        "windows above": {**SLIDING, "max_window_layers": 2},
        "layer_types": {**MIXED, "use_sliding_window": True},
        "yarn": {"rope_parameters": YARN},
    },
    "qwen3": {
        "windows above": {**SLIDING, "max_window_layers": 1},
        "bias": {"attention_bias": True},
    },
    "smollm3": {
        "interval": {"no_rope_layer_interval": 2},
        "list": {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": PLAIN},
        "no rope at all": {"no_rope_layers": [0] * 4},
        "windows": SLIDING,
        "bias": {"attention_bias": True},
    },
    "olmo2": {"bias": {"attention_bias": True}, "yarn": {"rope_parameters": YARN}},
    "olmo3": {
        "window": {"sliding_window": 5},
        "yarn in full layers": {
            "sliding_window": 5,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
    },
    "gemma3_text": {
        "window": {**MIXED, "query_pre_attn_scalar": 30},
        "linear in full layers": {
            **MIXED,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    },
}
ALWAYS = {"ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}}}
"""Of families whose default context is longer than the exports here."""
CASES = [
    pytest.param(
        family,
        shape,
        {**ALWAYS.get(family, {}), **given},
        id=f"{family}, {shape}",
        marks=[pytest.mark.slow] if number else [],
    )
    for family, own in OWN_SHAPES.items()
    for number, (shape, given) in enumerate({**own, **SHAPES}.items())
]
"""Of each family, the first shape is its own if it has one; the others are slow tests."""


def tokens(length: int) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def random_model(family: str, folder: Path, **given: Any) -> Any:
    """Save a model of transformers' own class with random weights."""
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **given})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "shape", "given"), CASES)
def test_logits_are_those_of_transformers(
    family: str, shape: str, given: dict[str, Any], tmp_path: Path
):
    expected = random_model(family, tmp_path / "theirs", **given)
    ours = load_pretrained(tmp_path / "theirs")
    for length in (9, 70):
        with torch.no_grad():
            found = ours.logits(reading(tokens(length)))
            assert_near(
                f"{family}, {shape}: read", found, expected(tokens(length)).logits, atol=1e-5
            )
    loss, _ = ours.loss(pack(tokens(21), bos=1))
    loss.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    export_pretrained(ours, tmp_path / "ours", context=256)
    again = theirs(tmp_path / "ours")
    assert type(again) is type(expected)
    with torch.no_grad():
        found = ours.logits(reading(tokens(70)))
        assert_near(
            f"{family}, {shape}: trained, exported", again(tokens(70)).logits, found, atol=1e-5
        )
    before, after = (open_checkpoint(tmp_path / name) for name in ("theirs", "ours"))
    assert (before.layers, before.tokens) == (after.layers, after.tokens)
    unlike = {"max_position_embeddings": 256, "head_dim": before.config.head_dim}
    assert vars(before.config) | unlike == vars(after.config)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "given"),
    [
        (
            "olmo3",
            {"sliding_window": 5, "rope_theta": 5e5, "rope_scaling": YARN | {"rope_theta": 5e5}},
        ),
        (
            "gemma3_text",
            {
                "sliding_window": 5,
                "sliding_window_pattern": 2,
                "rope_theta": 1e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("smollm3", {"rope_theta": 2e6, "no_rope_layer_interval": 3}),
        ("qwen2", {"rope_theta": 1e6, **SLIDING, "max_window_layers": 2}),
        ("mistral", {"rope_theta": 1e4}),
    ],
)
def test_config_json_as_transformers_4_wrote_it(family: str, given: dict[str, Any], tmp_path: Path):
    """What it leaves out has the family's own default."""
    random_model(family, tmp_path, **given)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SHAPE, **given}))
    expected = theirs(tmp_path)
    found = load_pretrained(tmp_path).logits(reading(tokens(70)))
    torch.testing.assert_close(found, expected(tokens(70)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        (
            "phi3",
            {},
            "model_type is 'phi3', expected one of "
            "llama, mistral, ministral3, qwen2, qwen3, smollm3",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation is 'silu', expected"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "key final_logit_softcapping 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("mistral", MIXED, "layer_types .* cannot be represented"),
        (
            "qwen3",
            MIXED,
            "layer_types has sliding_attention, but there is no sliding_window in use",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "expected 4 times full_attention or"),
        ("olmo3", {"layer_types": ["full_attention"] * 3}, "expected 4 times full_attention or"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta is 10000.0, which transformers 5 ignores"),
        ("olmo3", {"rope_parameters": PLAIN}, "rope_parameters has no full_attention"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {**YARN, "truncate": False}}},
            "rope key truncate false cannot be represented by type of layer",
        ),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ("ministral3", {"rope_parameters": YARN}, "must have one llama_4_scaling_beta and one"),
        (
            "ministral3",
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": "much"}},
            "rope key llama_4_scaling_beta is 'much', expected a number",
        ),
    ],
)
def test_what_no_row_can_tell_is_refused_by_name(
    family: str, given: dict[str, Any], message: str, tmp_path: Path
):
    config = {"model_type": family, **SHAPE, **given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def of_llama(layers: Layers, **given: Any) -> Llama:
    shape = {key: value for key, value in SHAPE.items() if key != "pad_token_id"}
    llama = Llama(LlamaConfig(**shape | given), layers)
    for name, parameter in llama.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return llama


ROUNDED = YaRN(1e4, factor=2, original_context=32, truncate=False)
HOTTER = LayerKind(RoPE(1e4), 5, QueryTemperature(8, 0.3))
ROTARY, LOCAL, NONE = LayerKind(RoPE(1e4)), LayerKind(RoPE(1e4), 5), LayerKind(NoPE())


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "given", "family"),
    [
        (Layers((ROTARY,), (0,) * 4), {}, "llama"),
        (Layers((LOCAL,), (0,) * 4), {}, "mistral"),
        (Layers((ROTARY, NONE), (0, 0, 0, 1)), {}, "smollm3"),
        (Layers((NONE,), (0,) * 4), {}, "smollm3"),
        (Layers((ROTARY, LOCAL), (0, 1, 0, 1)), {}, "smollm3"),
        (Layers((ROTARY,), (0,) * 4), {"qk_norm": "head"}, "qwen3"),
        (Layers((HOTTER,), (0,) * 4), {}, "ministral3"),
        (
            Layers((LOCAL, LayerKind(YaRN(1e4, factor=2, original_context=32))), (0, 1, 0, 1)),
            {"qk_norm": "width", "norm_placement": "after"},
            "olmo3",
        ),
    ],
)
def test_a_llama_whose_layers_changed_is_exported_as_the_family_that_has_them(
    layers: Layers, given: dict[str, Any], family: str, tmp_path: Path, capsys: Any
):
    llama = of_llama(layers, **given)
    export_pretrained(llama, tmp_path / "out", context=64)
    again = theirs(tmp_path / "out")
    assert type(again).__name__ == FAMILIES[family].architecture
    assert (f"written as {family}" in capsys.readouterr().out) == (family != "llama")
    found = llama.logits(reading(tokens(70)))
    torch.testing.assert_close(again(tokens(70)).logits, found, atol=1e-5, rtol=0)
    assert open_checkpoint(tmp_path / "out").layers == layers


@pytest.mark.parametrize(
    ("layers", "given", "message"),
    [
        (
            Layers((LOCAL, LayerKind(RoPE(1e4), 6)), (0, 1, 0, 1)),
            {},
            r"Hugging Face's Llama cannot represent layers that differ: 2 × .* keep the run folder",
        ),
        (
            Layers((LOCAL, LayerKind(ROUNDED)), (0, 1, 0, 1)),
            {"qk_norm": "width", "norm_placement": "after", "model_type": "olmo3"},
            "Olmo3 cannot represent layers that differ: .* truncate false .* keep the run folder",
        ),
        (
            Layers((replace(HOTTER, query_temperature=QueryTemperature(8, offset=1)),), (0,) * 4),
            {"model_type": "ministral3"},
            "Ministral3 cannot .*has one query temperature with offset 0 in all layers",
        ),
        (
            Layers((ROTARY,), (0,) * 4),
            {"norm_placement": "after"},
            "Hugging Face's Llama has norm_placement before; got after; keep the run folder",
        ),
    ],
)
def test_a_model_of_no_family_is_not_exported(
    layers: Layers, given: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        export_pretrained(of_llama(layers, **given), tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmo3", "gemma3_text", "smollm3"])
def test_tokens_decoded_with_a_cache_are_those_of_transformers(family: str, tmp_path: Path):
    expected = random_model(family, tmp_path, **(SLIDING if family == "smollm3" else MIXED))
    ours = load_pretrained(tmp_path)
    prompt = tokens(19)
    found = torch.stack(list(decode(ours, list(prompt), 16, prefill_tokens=7)), 1)
    for _ in range(16):
        prompt = torch.cat([prompt, expected(prompt).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, prompt[:, 19:])
