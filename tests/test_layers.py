"""Layers that differ, against a Llama written out in float64 with dense masks."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_longctx.batch import one_document, pack
from lit_longctx.decoding import decode, reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.cache import Cache
from lit_longctx.model.keys import KeySource
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.model.memory import Memory
from lit_longctx.model.sdpa import SDPA
from lit_longctx.position import DynamicNTK, NoPE, PositionScheme, RoPE, TransformerXL, YaRN

CONFIG = LlamaConfig(97, 48, 80, 4, 4, 2)
THETA = 500.0
FULL, LOCAL = LayerKind(RoPE(THETA)), LayerKind(RoPE(THETA), window=5)
MIXED = Layers((LOCAL, FULL, LayerKind(NoPE())), (0, 0, 1, 2))
"""Two local layers, a full one, one without positions."""
BACKENDS = ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


def mixed(attention: Any = "sdpa", layers: Layers = MIXED) -> Llama:
    llama = Llama(CONFIG, layers, attention)
    for name, parameter in llama.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return llama


def by_hand(llama: Llama, ids: Tensor, documents: Tensor, places: Tensor) -> Tensor:
    """Logits in float64: every score, then a mask; rotation as complex numbers."""
    w = {name: weight.double() for name, weight in llama.state_dict().items()}
    dim, seq = CONFIG.head_width, ids.shape[1]
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
    causal = (documents[:, :, None] == documents[:, None, :]) & (j <= i)
    x = w["model.embed_tokens.weight"][ids]
    angles = places[..., None] * THETA ** (-torch.arange(0, dim, 2).double() / dim)
    for layer, kind in enumerate(MIXED.kind_of):
        of = f"model.layers.{layer}."
        h = norm(x, w[of + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{of}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, dim)).transpose(1, 2)
            for name in "qkv"
        )
        if kind != 2:
            q, k = (rotated(each, angles) for each in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        seen = causal & (i - j < 5) if kind == 0 else causal
        scores = (q @ k.transpose(2, 3) / dim**0.5).masked_fill(~seen[:, None], float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + out @ w[of + "self_attn.o_proj.weight"].T
        h = norm(x, w[of + "post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{of}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[of + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def windows() -> Tensor:
    ids = torch.randint(3, 97, (2, 41))
    ids[0, [0, 13, 15]] = 1
    ids[1, 30] = 1
    return ids


@pytest.mark.parametrize("attention", BACKENDS)
@torch.no_grad()
def test_packed_documents(attention):
    llama, batch = mixed(attention), pack(windows(), bos=1)
    expected = by_hand(llama, batch.input_ids, batch.documents.ids, batch.position_ids)
    torch.testing.assert_close(llama.logits(batch).double(), expected, atol=2e-5, rtol=1e-5)
    nats = F.cross_entropy(expected.flatten(0, 1), batch.labels.flatten(), reduction="none")
    torch.testing.assert_close(llama(batch).double().flatten(), nats, atol=2e-5, rtol=1e-5)


def test_gradients_of_packed_documents():
    llama, batch = mixed(), pack(windows(), bos=1)
    loss, _ = llama.loss(batch)
    loss.backward()
    double = mixed().double()
    double.load_state_dict(llama.state_dict())
    leaves = dict(double.named_parameters())
    double.state_dict = lambda: leaves  # pyright: ignore[reportAttributeAccessIssue]
    logits = by_hand(double, batch.input_ids, batch.documents.ids, batch.position_ids)
    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").backward()
    for name, parameter in llama.named_parameters():
        expected = leaves[name].grad
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("source", ["cache", "memory"])
@torch.no_grad()
def test_read_in_parts(attention, source):
    llama, ids = mixed(attention), torch.randint(3, 97, (2, 37))
    ones = torch.zeros(ids.shape)
    expected = by_hand(llama, ids, ones, torch.arange(37.0).expand(2, 37))
    found = []
    past: KeySource = Cache(4, planned=37) if source == "cache" else Memory(40)
    for first, last in ((0, 11), (11, 12), (12, 30), (30, 37)):
        part = ids[:, first:last]
        batch = reading(part, first if source == "cache" else 0)
        if source == "memory":  # a window whose last token has a target goes on in the next
            batch = batch._replace(labels=torch.ones_like(part))
        found.append(llama.logits(batch, past))
    torch.testing.assert_close(torch.cat(found, 1).double(), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_of_different_lengths_are_continued():
    llama = mixed()
    prompts = [torch.randint(3, 97, (n,)) for n in (3, 14, 8)]
    new = torch.stack(list(decode(llama, prompts, 12, prefill_tokens=12)), 1)
    for prompt, tokens in zip(prompts, new, strict=True):
        ids = torch.cat([prompt, tokens])[None]
        expected = by_hand(llama, ids, torch.zeros(ids.shape), torch.arange(ids.shape[1])[None])
        assert torch.equal(tokens, expected[0, len(prompt) - 1 : -1].argmax(-1))


@torch.no_grad()
def test_codes_and_masks_are_made_once_for_each_kind(monkeypatch):
    made = []
    prepare = SDPA.prepare
    monkeypatch.setattr(SDPA, "prepare", lambda *given: (made.append(1), prepare(*given))[1])
    encode = RoPE.encode
    monkeypatch.setattr(RoPE, "encode", lambda *given: (made.append(2), encode(*given))[1])
    mixed()(pack(windows(), bos=1))
    assert sorted(made) == [1, 1, 1, 2, 2]


def test_layers_say_what_they_are():
    assert Layers.uniform(RoPE(THETA), 4).position == RoPE(THETA)
    assert str(MIXED) == (
        "2 × RoPE(theta=500.0) in windows of 5, 1 × RoPE(theta=500.0), 1 × NoPE()"
    )
    with pytest.raises(ValueError, match=r"several position schemes: RoPE\(theta=500.0\), NoPE"):
        _ = MIXED.position
    with pytest.raises(ValueError, match="kind_of names 4 layers; the config has 2"):
        Llama(LlamaConfig(97, 48, 80, 2, 4, 2), MIXED)
    with pytest.raises(ValueError, match="kind_of names kind 3; there are 3 kinds"):
        Layers(MIXED.kinds, (0, 1, 3))
    with pytest.raises(ValueError, match="window must be 1 or more; got 0"):
        LayerKind(NoPE(), window=0)


def test_another_theta_reaches_every_layer_that_has_one():
    changed = MIXED.with_theta(1e6)
    assert [getattr(kind.position, "theta", None) for kind in changed.kinds] == [1e6, 1e6, None]
    assert changed.kinds[0].window == 5
    different = Layers((LayerKind(RoPE(1e4), 5), LayerKind(RoPE(1e6))), (0, 1))
    with pytest.raises(ValueError, match=r"layers that share a base; they have 10000, 1e\+06"):
        different.with_theta(1e6)


@torch.no_grad()
def test_a_memory_refuses_what_depends_on_length():
    layers = Layers.uniform(DynamicNTK(factor=2, original_context=10), 4)
    with pytest.raises(ValueError, match="DynamicNTK cannot have a memory"):
        mixed(layers=layers).loss(pack(windows(), bos=1), Memory(8))


@pytest.mark.parametrize(
    "position",
    [YaRN(factor=4, original_context=64), TransformerXL()],
    ids=lambda p: type(p).__name__,
)
def test_a_documents_length_may_be_told_token_by_token(position: PositionScheme):
    """A part of a row, whose boundaries are not the row's, is encoded as in the whole."""
    schemes = [position, DynamicNTK(factor=2, original_context=10)]
    whole = pack(windows(), bos=1)
    lengths = whole.documents.lengths()
    part = one_document(2, 9)._replace(token_lengths=lengths[:, 8:17])
    for scheme in schemes:
        expected = scheme.encode(whole.position_ids, 12, whole.documents)[:, 8:17]
        assert torch.equal(scheme.encode(whole.position_ids[:, 8:17], 12, part), expected)


class Peak(TorchDispatchMode):
    """Most bytes of tensors, other than those of a model, that are alive at a time."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known = weakref.WeakSet(weight.untyped_storage() for weight in llama.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage()) not in self.known
            ):
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def freed(self, size: int) -> None:
        self.alive -= size


class Kernel(SDPA):
    """What a fused kernel holds: its inputs and its output."""

    def attend(self, q, k, v, mask, scale):
        return torch.empty_like(q)


def peak_without_gradient(num_layers: int, tokens: int) -> float:
    """GiB of activations in a forward pass of Llama-3-8B up to the head, bfloat16."""
    shape = LlamaConfig(128_256, 4096, 14_336, num_layers, 32, 8)
    with torch.device("meta"):
        llama = Llama(shape, RoPE(5e5)).bfloat16()
        batch = reading(torch.zeros(1, tokens, dtype=torch.long))
    llama.backend = Kernel()
    for block in llama.model.layers:
        block.self_attn.backend = llama.backend
    with torch.no_grad(), Peak(llama) as counted:
        llama.hidden(batch)
    return counted.peak / 2**30


@pytest.mark.slow
def test_the_peak_without_gradient_does_not_grow_with_the_layers():
    """131,072 tokens of Llama-3-8B; a block's input is 1 GiB, and 32 of them were kept before."""
    one, all_of_them = (peak_without_gradient(n, 131_072) for n in (1, 32))
    print(f"peak of a forward pass without gradient, Llama-3-8B, 131,072: {all_of_them:.1f} GiB")
    assert all_of_them == one
