"""Rope settings in every place and spelling, against transformers: the same model, or refused."""

import json
import subprocess
import sys
from itertools import product
from math import isclose

import pytest
import torch

from lit_longctx.checkpoint import export_pretrained, load_pretrained, readers
from lit_longctx.checkpoint.hugging_face import config_json, read_config
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    ProportionalRoPE,
    RoPE,
    YaRN,
)

transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
BASE = {"model_type": "llama", **SHAPE}
ORIGINAL = "original_max_position_embeddings"
LISTS = {
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.3, "factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, ORIGINAL: 1024},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 1024},
    "longrope": {"factor": 4.0, ORIGINAL: 1024, **LISTS},
}


def read(folder, config):
    (folder / "config.json").write_text(json.dumps({**BASE, **config}))
    return read_config(folder)[1].position


def assert_same_as_transformers(folder, position):
    config = transformers.LlamaConfig.from_pretrained(folder)
    theirs = LlamaRotaryEmbedding(config)
    for length in (1, 900, 4000, 9000):
        theirs(torch.zeros(1), torch.tensor([[length - 1]]))
        ours = position.frequencies(16, length)
        torch.testing.assert_close(ours, theirs.inv_freq.float(), rtol=1e-6, atol=0)
    assert isclose(position.attention_scaling, theirs.attention_scaling, rel_tol=1e-6)


def spelled(kind, place, key, theta, original):
    """Settings of a rope type, written in one of the ways that are about."""
    rope = {key: kind, **ROPES[kind]}
    config = {}
    if ORIGINAL in rope and original == "beside":
        config[ORIGINAL] = rope.pop(ORIGINAL)
    if theta == "beside":
        config["rope_theta"] = 5e5
    else:
        rope["rope_theta"] = 5e5
    for name in ("rope_parameters", "rope_scaling"):
        if place in (name, "both"):
            config[name] = dict(rope)
    return config


@pytest.mark.parametrize("kind", ROPES)
def test_every_place_and_spelling_means_what_it_means_in_transformers(kind, tmp_path):
    places, keys = ("rope_parameters", "rope_scaling", "both"), ("rope_type", "type")
    for spelling in product(places, keys, ("beside", "inside"), ("beside", "inside")):
        config = spelled(kind, *spelling)
        assert_same_as_transformers(tmp_path, read(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": None, "rope_theta": 5e5},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {},
        {"rope_interleaved": False, "partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024, "truncate": True}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": 1.138629436112}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4, ORIGINAL: 7, "finetuned": False}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, ORIGINAL: 1024}},
        {"rope_scaling": {"rope_type": "longrope", **LISTS}, ORIGINAL: 512},
        {ORIGINAL: 1024},
    ],
    ids=str,
)
def test_what_changes_nothing_is_read(config, tmp_path):
    assert_same_as_transformers(tmp_path, read(tmp_path, config))


YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024}


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0}, {}),
        ({"mscale": 1.0, "mscale_all_dim": 1e-9}, {}),
        ({"attention_factor": 1.138629436112, "mscale": 0.7}, {}),
        ({"truncate": False}, {"truncate": False}),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        ({"attention_factor": 1.0, "mscale": 2.0}, {"attention_factor": 1.0}),
    ],
    ids=str,
)
def test_keys_of_yarn_are_fields_unless_they_tell_the_default(keys, fields, tmp_path):
    expected = YaRN(1e4, factor=4.0, original_context=1024, **fields)
    found = read(tmp_path, {"rope_scaling": {**YARN, **keys}})
    assert found == expected
    assert_same_as_transformers(tmp_path, found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN},
            "rope_parameters says .*default, rope_scaling .*yarn; remove one",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e5},
            "rope_theta is 10000.0 in rope_parameters, 500000.0 beside it",
        ),
        (
            {"rope_scaling": YARN, ORIGINAL: 2048},
            f"{ORIGINAL} is 1024 in rope_scaling, 2048 beside it",
        ),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "type and rope_type, linear and yarn"),
        ({"rope_scaling": 4.0}, "rope_scaling is 4.0, expected an object"),
        ({"rope_scaling": {**YARN, "factor": float("nan")}}, "rope key factor is nan"),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "rope key factor is inf"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "rope key factor is '4', expected a number"),
        ({"rope_scaling": {**YARN, "factor": True}}, "rope key factor is True"),
        ({"rope_scaling": {**YARN, "factor": 0.0}}, "factor must be a finite number above 0"),
        ({"rope_scaling": {**YARN, ORIGINAL: 0}}, "original_context must be 1 or more"),
        ({"rope_theta": float("nan")}, "rope key rope_theta is nan"),
        ({"rope_theta": 0.0}, "theta must be a finite number above 0; got 0.0"),
        (
            {"rope_scaling": {"rope_type": "longrope", **LISTS, "long_factor": [1.0] * 7}},
            "long_factor must be 8 numbers for head_dim 16; got 7",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", **LISTS, "short_factor": [None] * 8}},
            "rope key short_factor is None",
        ),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "rope key mscale cannot be"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 0.7}}, "mscale_all_dim cannot be"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, "truncate is 0, expected true or false"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor must be a finite"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "truncate": False}},
            "rope key truncate cannot be represented with rope_type linear",
        ),
        ({"rope_scaling": {**YARN, "rope_type": "llama3"}}, "low_freq_factor is missing"),
        ({"rope_interleaved": True}, "key rope_interleaved True cannot be represented"),
        ({"rotary_pct": 0.25}, "key rotary_pct 0.25 cannot be represented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 cannot be represented"),
    ],
    ids=str,
)
def test_what_would_be_another_model_is_refused_by_name(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, config)


# ---- out

SCHEMES = {
    "RoPE": RoPE(5e5),
    "PI": PositionInterpolation(1e4, factor=4),
    "NTKAware": NTKAware(1e4, factor=4),
    "DynamicNTK": DynamicNTK(1e4, factor=2, original_context=512),
    "ProportionalRoPE": ProportionalRoPE(1e4, partial_rotary_factor=0.3, factor=2),
    "YaRN": YaRN(1e5, factor=4, original_context=512, beta_fast=16),
    "YaRN, truncate": YaRN(1e5, factor=4, original_context=512, truncate=False),
    "YaRN, mscale": YaRN(1e5, factor=4, original_context=512, mscale=0.7, mscale_all_dim=0.4),
    "YaRN, attention_factor": YaRN(1e5, factor=4, original_context=512, attention_factor=0.9),
    "Llama3": Llama3(5e5, factor=8, original_context=512),
    "LongRoPE": LongRoPE(1e4, factor=4, original_context=512, **LISTS),
}


NAMED = {
    "DynamicNTK": 2,
    "LongRoPE": 2,
    "ProportionalRoPE": 4,
    "YaRN, truncate": 2,
    "YaRN, mscale": 4,
    "YaRN, attention_factor": 2,
}
"""Lines on programs that read another model."""


@pytest.mark.parametrize("name", SCHEMES)
def test_every_program_finds_the_keys_where_it_looks(name, tmp_path):
    llama = Llama(LlamaConfig(**SHAPE), SCHEMES[name])
    config = config_json(llama, 2048, torch.float32)
    lines = readers.check(config)
    assert len(lines) == NAMED.get(name, 0)
    for reader in readers.READERS:
        for key in reader.keys.get(config["rope_parameters"]["rope_type"], ()):
            field = key.rsplit(".", 1)[-1]
            expected = {
                **SCHEMES[name].to_rope(16),
                "max_position_embeddings": 512 if name == "DynamicNTK" else 2048,
                "attention_factor": SCHEMES[name].attention_scaling,
            }
            assert readers.lookup(config, key) == expected[field], (reader.name, key)
    again = load_pretrained(export_pretrained(llama, tmp_path / "out", context=2048))
    assert again.position == read(tmp_path, config)


def test_a_program_that_would_misread_a_key_is_named():
    config = config_json(
        Llama(LlamaConfig(**SHAPE), SCHEMES["YaRN, attention_factor"]), 2048, torch.float32
    )
    own = "llama.cpp multiplies attention_factor with an attention factor of its own"
    assert readers.check(config) == ["vLLM does not read attention_factor", own]
    del config["rope_parameters"]["beta_fast"]
    with pytest.raises(ValueError, match=r"5 would misread rope_parameters.beta_fast"):
        readers.check(config)


def test_yarn_at_another_context_than_its_reach_is_refused_with_the_version():
    llama = Llama(LlamaConfig(**SHAPE), SCHEMES["YaRN"])
    message = (
        r"transformers before 4.56 takes YaRN's factor from the context: expected a context of "
        r"2,048 \(factor 4 × 512\), got 4,096; export with context 2048"
    )
    with pytest.raises(ValueError, match=message):
        config_json(llama, 4096, torch.float32)


def test_longrope_at_another_context_keeps_its_attention_factor(tmp_path):
    llama = Llama(LlamaConfig(**SHAPE), SCHEMES["LongRoPE"])
    export_pretrained(llama, tmp_path / "out", context=4096)
    assert_same_as_transformers(tmp_path / "out", llama.position)
    assert load_pretrained(tmp_path / "out").position == llama.position
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scales = [config["rope_scaling"][key] for key in ("short_mscale", "long_mscale")]
    assert scales == [llama.position.attention_scaling] * 2  # vLLM reads these


VERSIONS = {
    "4.51.3": ("tokenizers==0.21.4", "huggingface_hub==0.36.0"),
    "4.57.1": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
}
READ_ASIDE = """
import json, sys, torch, transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
found = {}
for folder in sys.argv[1:]:
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder))
    lengths = {}
    for length in (1, 400, 600, 1900, 4000):
        theirs(torch.zeros(1), torch.tensor([[length - 1]]))
        lengths[length] = theirs.inv_freq.tolist()
    found[folder] = [theirs.attention_scaling, lengths]
print(json.dumps([transformers.__version__, found]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions_of_transformers_read_the_same_model(version, tmp_path):
    """Installed aside; skipped where the package index is out of reach."""
    wanted = [f"transformers=={version}", *VERSIONS[version]]
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "aside")]
    if subprocess.run([sys.executable, *install, *wanted], capture_output=True).returncode:
        pytest.skip(f"transformers {version} cannot be installed here")
    folders = {}
    for name, scheme in SCHEMES.items():
        if (version, name) == ("4.51.3", "YaRN, truncate") or name == "ProportionalRoPE":
            continue  # an export says so
        llama = Llama(LlamaConfig(**SHAPE), scheme)
        for context in (2048,) if name.startswith("YaRN") else (2048, 4096):
            folder = export_pretrained(llama, tmp_path / f"{name}-{context}", context=context)
            folders[str(folder)] = scheme
    ran = subprocess.run(
        [sys.executable, "-c", READ_ASIDE, *folders],
        env={"PYTHONPATH": str(tmp_path / "aside"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    told, found = json.loads(ran.stdout.splitlines()[-1])
    assert told == version, ran.stderr
    for folder, scheme in folders.items():
        attention, lengths = found[folder]
        assert isclose(attention, scheme.attention_scaling, rel_tol=1e-6), folder
        for length, frequencies in lengths.items():
            expected = scheme.frequencies(16, int(length))
            torch.testing.assert_close(torch.tensor(frequencies), expected, rtol=1e-6, atol=0)
