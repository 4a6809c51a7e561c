"""What a scheme leaves open is the checkpoint's, by one mechanism, wherever a model is built."""

from dataclasses import replace

import pytest
import torch
from schemes import every_scheme

from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import DynamicNTK, NoPE, RoPE, TransformerXL, YaRN
from lit_longctx.training.module import ContinualPretrain

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
OPEN = {"theta": None, "original_context": None}


def left_open(scheme):
    return replace(scheme, **{name: None for name in OPEN if name in vars(scheme)})


def given(scheme, **values):
    return replace(scheme, **{name: v for name, v in values.items() if name in vars(scheme)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder whose theta is not 10,000."""
    llama = Llama(LlamaConfig(**SHAPE), RoPE(1e5))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(0.1, 0.2)
    return export_pretrained(llama, tmp_path_factory.mktemp("start") / "hf")


SCHEMES = {type(scheme).__name__: left_open(scheme) for scheme in every_scheme(16)}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_checkpoint_fills_in_what_is_left_open_and_says_so(name, folder, capsys):
    expected = given(SCHEMES[name], theta=1e5, original_context=40)
    assert load_pretrained(folder, SCHEMES[name]).position == expected
    lines = [f"position: theta 100000 from {folder}"]
    if "original_context" in vars(expected):
        lines.append(f"position: original_context 40 from {folder}")
    assert capsys.readouterr().out.splitlines() == lines
    module = ContinualPretrain(checkpoint=str(folder), position=SCHEMES[name])
    assert module.layers == Layers.uniform(expected, 2)
    assert capsys.readouterr().out.splitlines() == lines
    assert load_pretrained(folder, expected).position == expected
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_the_model_is_the_one_that_transformers_makes_of_the_checkpoint(folder, tmp_path):
    ids = torch.randint(3, 97, (1, 80), generator=torch.Generator().manual_seed(0))
    llama = load_pretrained(folder, YaRN(factor=2))
    rope = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 2.0}
    rope["original_max_position_embeddings"] = 40
    config = transformers.LlamaConfig.from_pretrained(folder, rope_parameters=rope)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, config=config)
    expected = theirs.eval()(ids).logits
    torch.testing.assert_close(llama.logits(reading(ids)), expected, atol=1e-5, rtol=1e-5)
    exported = export_pretrained(llama, tmp_path / "out", context=80)
    again = transformers.LlamaForCausalLM.from_pretrained(exported).eval()(ids).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_without_a_checkpoint_the_config_says_it():
    config = LlamaConfig(**SHAPE)
    expected = YaRN(1e4, factor=4, original_context=40)
    assert Llama(config, YaRN(factor=4)).position == expected
    module = ContinualPretrain(config=config, position=DynamicNTK(factor=2))
    assert module.layers.position == DynamicNTK(1e4, factor=2, original_context=40)
    assert ContinualPretrain(config=config).layers.position == RoPE(1e4)


@pytest.mark.parametrize("name", SCHEMES)
def test_standing_alone_theta_counts_as_10_000(name):
    alone, places = SCHEMES[name], torch.arange(50)[None]
    if "original_context" in vars(alone):
        alone = replace(alone, original_context=40)
    expected = given(alone, theta=10_000.0).encode(places, 16)
    torch.testing.assert_close(alone.encode(places, 16), expected, atol=0, rtol=0)


def test_a_scheme_that_learns_weights_takes_theta_too(folder):
    assert load_pretrained(folder, TransformerXL()).position == TransformerXL(1e5)


def test_what_a_run_was_trained_with_is_stored_resolved_and_inherited(tmp_path, folder):
    """The original context of a scheme that has one comes before the context trained on."""
    llama = load_pretrained(folder, YaRN(factor=4))
    again = export_pretrained(llama, tmp_path / "out", context=160)
    assert open_checkpoint(again).trained_context == 160
    assert load_pretrained(again, YaRN(factor=8)).position.original_context == 40
    assert load_pretrained(again, RoPE()).position == RoPE(1e5)


def test_layers_that_differ_in_theta_need_a_number(folder):
    opened = open_checkpoint(folder)
    kinds = LayerKind(RoPE(1e4)), LayerKind(RoPE(1e6)), LayerKind(NoPE())
    mixed = replace(opened, layers=Layers(kinds, (0, 1)))
    with pytest.raises(ValueError, match="RoPE's theta is left open, but layers of the checkpoint"):
        mixed.layers_with(RoPE())
    assert mixed.layers_with(RoPE(5e5)) == Layers.uniform(RoPE(5e5), 2)
    some = Layers((LayerKind(YaRN(factor=2)), LayerKind(NoPE())), (0, 1))
    expected = YaRN(1e5, factor=2, original_context=40)
    assert opened.layers_with(some).kinds == (LayerKind(expected), LayerKind(NoPE()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": float("nan")}, "theta must be a finite number above 0; got nan"),
        ({"theta": 0.0}, "theta must be a finite number above 0; got 0.0"),
        ({"factor": float("nan")}, "factor must be a finite number above 0; got nan"),
        ({"factor": float("inf")}, "factor must be a finite number above 0; got inf"),
        ({"original_context": 0}, "original_context must be 1 or more tokens; got 0"),
    ],
    ids=str,
)
def test_values_from_which_no_position_follows_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        YaRN(**{"factor": 2.0, **fields})
