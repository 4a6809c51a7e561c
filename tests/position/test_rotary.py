"""Every rotary scheme against transformers, the YaRN and xPos authors, float64."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from differences import assert_near
from safetensors.torch import load_file

from lit_longctx.batch import documents_from_starts
from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    RoPE,
    XPos,
    YaRN,
)

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


def theirs(head_dim, context, length=None, **rope):
    """Frequencies and attention factor of transformers for a config with these rope parameters."""
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters=rope,
    )
    function = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    return function(config, "cpu", seq_len=length)


def random_settings(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    return {
        "head_dim": pick(32, 64, 80, 128),
        "theta": pick(1e4, 5e5, 8e6),
        "factor": pick(2.0, 4.0, 16.0, 32.0),
        "context": pick(2048, 4096, 8192),
    }


CASES = [random_settings(seed) for seed in range(24)]


def close(scheme, head_dim, expected, length=None):
    frequencies, factor = expected
    found = scheme.frequencies(head_dim, length)
    assert found.dtype == torch.float32
    name = type(scheme).__name__
    assert_near(f"{name}: frequencies, transformers", found, frequencies, rtol=1e-6)
    assert scheme.attention_scaling == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case):
    dim, theta, s, context = case["head_dim"], case["theta"], case["factor"], case["context"]
    rope = {"rope_theta": theta, "factor": s}
    expected = theirs(dim, context, rope_type="linear", **rope)
    close(PositionInterpolation(theta, factor=s), dim, expected)

    original = {"original_max_position_embeddings": context}
    expected = theirs(dim, int(context * s), rope_type="yarn", **rope, **original)
    close(YaRN(theta, factor=s, original_context=context), dim, expected)

    expected = theirs(dim, context, rope_type="yarn", **rope, **original, beta_fast=16, beta_slow=2)
    scheme = YaRN(theta, factor=s, original_context=context, beta_fast=16, beta_slow=2)
    close(scheme, dim, expected)

    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = theirs(dim, context, rope_type="llama3", **rope, **original, **bounds)
    close(Llama3(theta, factor=s, original_context=context), dim, expected)

    scheme = DynamicNTK(theta, factor=s, original_context=context)
    for length in (context // 2, context, context + 1, 5 * context):
        expected = theirs(dim, context, length, rope_type="dynamic", **rope)
        close(scheme, dim, expected, length)

    lists = {
        "short_factor": (1 + torch.rand(dim // 2)).tolist(),
        "long_factor": (1 + 30 * torch.rand(dim // 2)).tolist(),
    }
    scheme = LongRoPE(theta, factor=s, original_context=context, **lists)
    for length in (context, context + 1):
        expected = theirs(dim, context, length, rope_type="longrope", **rope, **original, **lists)
        close(scheme, dim, expected, length)
        assert torch.equal(scheme.frequencies(dim, length), expected[0])  # the order of divisions


YARN_KEYS = [
    {},
    {"mscale": 0.707, "mscale_all_dim": 0.3},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"attention_factor": 0.9},
]


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("keys", YARN_KEYS, ids=str)
def test_every_key_of_yarn_against_transformers(keys, truncate):
    for case in CASES[:8]:
        dim, theta, s, context = case["head_dim"], case["theta"], case["factor"], case["context"]
        rope = {"rope_theta": theta, "factor": s, "original_max_position_embeddings": context}
        for betas in ({}, {"beta_fast": 16.0, "beta_slow": 2.0}):
            asked = {**rope, **keys, **betas, "truncate": truncate}
            expected = theirs(dim, int(context * s), rope_type="yarn", **asked)
            scheme = YaRN(
                theta, factor=s, original_context=context, truncate=truncate, **keys, **betas
            )
            close(scheme, dim, expected)
            rounded = replace(scheme, truncate=not truncate).frequencies(dim)
            assert not torch.equal(rounded, scheme.frequencies(dim))
            assert scheme.attention_scaling == expected[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mscale": 0.7}, "mscale and mscale_all_dim go together; got one; give both or neither"),
        ({"mscale_all_dim": 0.7}, "mscale and mscale_all_dim go together"),
        (
            {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
            "got attention_factor and mscale; give one",
        ),
        ({"attention_factor": 0.0}, "attention_factor must be a finite number above 0; got 0.0"),
    ],
    ids=str,
)
def test_what_leaves_yarns_attention_factor_open_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        YaRN(factor=4, original_context=4096, **keys)


@pytest.mark.parametrize("case", CASES)
def test_against_closed_forms_in_float64(case):
    dim, theta, s = case["head_dim"], case["theta"], case["factor"]
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    rope = theta**-exponents
    ntk = (theta * s ** (dim / (dim - 2))) ** -exponents
    for scheme, expected in (
        (RoPE(theta), rope),
        (NTKAware(theta, factor=s), ntk),
        (XPos(theta), rope),
        (PositionInterpolation(theta, factor=s), rope / s),
    ):
        what = f"{type(scheme).__name__}: frequencies, closed form in float64"
        assert_near(what, scheme.frequencies(dim).double(), expected, rtol=1e-6)


def test_ntk_bases_of_the_literature():
    assert NTKAware(1e4, factor=16).scaled_theta(128) == pytest.approx(167_199, abs=1)
    assert NTKAware(5e5, factor=8).scaled_theta(128) == pytest.approx(4.134e6, rel=1e-3)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "yarn_reference.json").read_text()), ids=str)
def test_yarn_against_its_authors(case):
    scheme = YaRN(
        case["base"],
        factor=case["factor"],
        original_context=case["original_max_position_embeddings"],
    )
    expected = torch.tensor(case["inv_freq"])
    found = scheme.frequencies(case["head_dim"])
    assert_near("YaRN: frequencies, its authors' code", found, expected, rtol=1e-6)
    assert scheme.attention_scaling == pytest.approx(case["attention_factor"], rel=1e-12)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """The ramp's ends for Llama 2, and its direction: litgpt 0.5.13 has it the other way round."""
    scheme = YaRN(1e4, factor=16, original_context=4096)
    ratio = scheme.frequencies(128) / RoPE(1e4).frequencies(128)
    assert (ratio[:21] == 1).all()
    assert ratio[21] < 1
    torch.testing.assert_close(ratio[46:], torch.full((18,), 1 / 16))
    assert ratio[45] > 1 / 16


def test_xpos_against_torchscale():
    golden = load_file(GOLDEN / "xpos.safetensors")
    halves = [*range(0, 32, 2), *range(1, 32, 2)]  # interleaved pairs → half-split
    q, k = (golden[name][..., halves].transpose(0, 1)[None] for name in ("q", "k"))
    for centre in (0, 32, 16_384):
        scheme = XPos(scale_base=512, centre=centre)
        code = scheme.encode(torch.arange(64)[None], 32)
        turned_q, turned_k = scheme.layer(3, 32)(q, k, code)
        scores = torch.einsum("bqhd,bkhd->hqk", turned_q, turned_k).tril()
        expected = golden["scores"].tril()
        assert_near("XPos: scores, torchscale", scores, expected, rtol=1e-5, atol=1e-5)


def test_xpos_refuses_places_whose_scales_leave_float32():
    scheme = XPos(centre=35_600)
    finite = scheme.encode(torch.tensor([[0, 71_200]]), 128)
    assert finite.isfinite().all()
    cos_and_sin = finite.unflatten(-1, (2, 2, 64))  # of q and of k, times their scales
    assert (cos_and_sin.double().norm(dim=-2) > 0).all()
    with pytest.raises(
        ValueError, match=r"leave float32 at position 80,000.*scale_base to (\d+)"
    ) as e:
        scheme.encode(torch.tensor([[0, 80_000]]), 128)
    fitting = int(str(e.value).split("scale_base to ")[1].split()[0])
    XPos(centre=35_600, scale_base=fitting).encode(torch.tensor([[0, 80_000]]), 128)


def schemes():
    lists = {"short_factor": [1.0] * 16, "long_factor": [1 + i / 4 for i in range(16)]}
    return {
        "RoPE": RoPE(),
        "PI": PositionInterpolation(factor=8),
        "NTKAware": NTKAware(factor=8),
        "DynamicNTK": DynamicNTK(factor=2, original_context=8),
        "YaRN": YaRN(factor=8, original_context=4096),
        "Llama3": Llama3(factor=8, original_context=4096),
        "LongRoPE": LongRoPE(factor=8, original_context=8, **lists),
        "XPos": XPos(),
    }


def test_identities():
    places = torch.arange(3000)[None]
    yarn = YaRN(factor=1, original_context=4096).encode(places, 32)
    torch.testing.assert_close(yarn, RoPE().encode(places, 32))
    interpolated = PositionInterpolation(factor=8).encode(places * 8, 32)
    torch.testing.assert_close(interpolated, RoPE().encode(places, 32), atol=2e-4, rtol=0)
    dynamic = DynamicNTK(factor=4, original_context=4096).encode(places, 32)
    torch.testing.assert_close(dynamic, RoPE().encode(places, 32))


@pytest.mark.parametrize("name", schemes())
def test_code_is_float32_whatever_the_positions_are(name):
    scheme = schemes()[name]
    whole = scheme.encode(torch.arange(10)[None], 32)
    fractions = scheme.encode(torch.arange(10.0, dtype=torch.float64)[None], 32)
    assert whole.dtype == fractions.dtype == torch.float32
    torch.testing.assert_close(whole, fractions)


def test_length_dependent_schemes_look_at_each_document():
    """Documents of 6, 20 and 9 tokens, original context 8: only the longer ones stretch."""
    starts = torch.zeros(1, 35, dtype=torch.bool)
    starts[0, [0, 6, 26]] = True
    documents = documents_from_starts(starts)
    places = torch.cat([torch.arange(6), torch.arange(20), torch.arange(9)])[None]
    for name in ("DynamicNTK", "LongRoPE"):
        scheme = schemes()[name]
        code = scheme.encode(places, 32, documents)[0]
        for begin, length in ((0, 6), (6, 20), (26, 9)):
            angles = torch.outer(torch.arange(length).float(), scheme.frequencies(32, length))
            expected = torch.cat([angles.cos(), angles.sin()], -1) * scheme.attention_scaling
            torch.testing.assert_close(code[begin : begin + length], expected, atol=1e-5, rtol=0)


def test_longrope2_keeps_short_documents_as_its_authors_config_does():
    """Two documents of a row against transformers, whose short_factor is a list of ones."""
    far = [1.0 + i for i in range(16)]
    scheme = LongRoPE(5e5, factor=4, original_context=8, long_factor=far)
    rope = {"rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0] * 16, "long_factor": far}
    starts = torch.zeros(1, 26, dtype=torch.bool)
    starts[0, [0, 6]] = True
    places = torch.cat([torch.arange(6), torch.arange(20)])[None]
    code = scheme.encode(places, 32, documents_from_starts(starts))[0]
    for begin, length in ((0, 6), (6, 20)):
        frequencies, factor = theirs(32, 32, length, rope_type="longrope", **rope)
        assert torch.equal(scheme.frequencies(32, length), frequencies)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        expected = torch.cat([angles.cos(), angles.sin()], -1) * factor
        assert_near("LongRoPE2: code", code[begin : begin + length], expected, atol=1e-6)
    assert scheme.to_rope(32) == {"rope_type": "longrope", **rope}


def test_longrope_leaves_the_first_places_alone():
    lists = {"short_factor": [2.0] * 16, "long_factor": [4.0] * 16}
    scheme = LongRoPE(factor=4, original_context=100, unscaled_tokens=3, **lists)
    angles = torch.atan2(*scheme.encode(torch.arange(6)[None], 32)[0].chunk(2, -1)[::-1])
    expected = [0, 1, 2, 3 / 2, 4 / 2, 5 / 2]
    torch.testing.assert_close(angles[:, 0], torch.tensor(expected), atol=1e-6, rtol=0)
    norms = scheme.encode(torch.arange(6)[None], 32)[0].unflatten(-1, (2, 16)).norm(dim=1)[:, 0]
    factor = math.sqrt(1 + math.log(4) / math.log(100))  # the authors' code: not for the first n̂
    torch.testing.assert_close(norms, torch.tensor([1.0] * 3 + [factor] * 3))


def test_longrope_needs_a_factor_per_pair():
    with pytest.raises(ValueError, match="short_factor must be 32 numbers for head_dim 64; got 16"):
        schemes()["LongRoPE"].frequencies(64)


def score(scheme, shift, dtype, seed=0):
    """Scores of random q and k at distances 0 … 63, moved by `shift` places."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 64, 1, 64, generator=generator).to(dtype)
    layer = scheme.layer(1, 64)
    turned_q, turned_k = layer(q, k, scheme.encode(torch.arange(shift, shift + 64)[None], 64))
    return torch.einsum("bqhd,bkhd->qk", turned_q.float(), turned_k.float()).tril()


RELATIVE = {
    "PI": PositionInterpolation(factor=8),
    "NTKAware": NTKAware(factor=8),
    "YaRN": YaRN(factor=32, original_context=4096),
    "Llama3": Llama3(theta=5e5, factor=32, original_context=8192),
    "XPos": XPos(scale_base=2048, centre=65_536),
}


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("shift", [1000, 32_000, 128_000])
def test_shift_invariance_is_as_good_as_ropes_own(name, shift):
    """bf16 q and k at places up to 128k; the baseline is what rounding does to RoPE itself."""
    scheme = RELATIVE[name]
    own = (score(scheme, shift, torch.bfloat16) - score(scheme, 0, torch.bfloat16)).abs().max()
    baseline = max(
        (score(RoPE(), shift, torch.bfloat16, i) - score(RoPE(), 0, torch.bfloat16, i)).abs().max()
        for i in range(4)
    )
    assert own <= 1.5 * baseline * scheme.attention_scaling**2


def test_attention_factors_of_the_literature():
    for s, expected in ((4, 1.1386), (8, 1.2079), (16, 1.2773), (32, 1.3466)):
        found = YaRN(factor=s, original_context=4096).attention_scaling
        assert found == pytest.approx(expected, abs=5e-5)
    lists = {"short_factor": [1.0], "long_factor": [1.0]}
    found = LongRoPE(factor=4, original_context=4096, **lists).attention_scaling
    assert found == pytest.approx(math.sqrt(1 + math.log(4) / math.log(4096)))


@pytest.mark.parametrize("scheme", [DynamicNTK, YaRN, Llama3])
def test_the_original_context_must_be_known_before_anything_is_computed(scheme):
    alone = scheme(factor=4)
    message = f"{scheme.__name__}'s original_context is missing"
    with pytest.raises(ValueError, match=message):
        alone.frequencies(32)
    with pytest.raises(ValueError, match=message):
        alone.encode(torch.arange(4)[None], 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [YaRN(factor=4, original_context=64), XPos()])
def test_long_rows_rotated_by_tiles_are_the_same_to_the_bit(scheme, dtype, monkeypatch):
    layer = scheme.layer(4, 16)
    code = scheme.encode(torch.arange(50).expand(2, 50), 16)
    found: list[list[torch.Tensor]] = []
    for at_once in (2**25, 300):  # all; 2 tokens of 2 rows
        monkeypatch.setattr("lit_longctx.position.rotation.FEATURES_AT_ONCE", at_once)
        torch.manual_seed(1)
        q, k = (torch.randn(2, 50, n, 16).to(dtype).requires_grad_() for n in (4, 2))
        out = layer(q, k, code)
        sum((x.float() * torch.randn(x.shape)).sum() for x in out).backward()
        found.append([*out, q.grad, k.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
