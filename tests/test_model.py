"""The Llama against transformers, and against itself packed, cut and cached."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from schemes import every_scheme

from lit_longctx.batch import pack
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig, initial_weight
from lit_longctx.model.cache import Cache
from lit_longctx.model.layers import LayerKind, LayerPattern
from lit_longctx.position import NoPE, PositionScheme, QueryTemperature, RoPE

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 20, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "eps": {"rms_norm_eps": 1e-3},
}


def randomised(llama, std=0.15):
    """Weights large enough that a mistake shows."""
    for name, parameter in llama.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, std)
    return llama


def tiny(position=None, **kind):
    return randomised(Llama(LlamaConfig(**SHAPE, **kind), position or RoPE(theta=500.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind):
    ours = tiny(**KINDS[kind])
    config = transformers.LlamaConfig(
        **SHAPE, **KINDS[kind], rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours.logits(reading(ids))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


HOTTER = LayerKind(NoPE(), query_temperature=QueryTemperature(floor_scale=4))
SCHEMES = [*every_scheme(12), LayerPattern(["hotter"], {"hotter": HOTTER})]
all_schemes = pytest.mark.parametrize("position", SCHEMES, ids=lambda p: type(p).__name__)


def windows(rows=2, tokens=60):
    ids = torch.randint(3, 97, (rows, tokens + 1))
    ids[:, 0] = 1
    ids[0, 17] = ids[0, 18] = ids[0, 50] = ids[1, 33] = ids[1, 59] = 1
    return ids


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@all_schemes
@torch.no_grad()
def test_packed_equals_separate_documents(position, attention):
    config = LlamaConfig(**SHAPE, num_key_value_heads=2)
    llama = randomised(Llama(config, position, attention))
    ids = windows()
    packed = llama(pack(ids, bos=1))
    for row in range(2):
        starts = [i for i in range(60) if i == 0 or ids[row, i] == 1]
        for begin, end in zip(starts, [*starts[1:], 60], strict=True):
            document = ids[row : row + 1, begin : end + 1]
            alone = llama(pack(document, bos=1))[0]
            torch.testing.assert_close(packed[row, begin:end], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@all_schemes
@torch.no_grad()
def test_a_changed_token_moves_only_later_places_of_its_own_document(attention, position):
    llama = randomised(Llama(LlamaConfig(**SHAPE), position, attention))
    ids = windows()
    before = llama.logits(pack(ids, bos=1))
    ids[0, 25] = 96 if ids[0, 25] != 96 else 95  # inside the document 18 … 49
    moved = (llama.logits(pack(ids, bos=1)) - before).abs().amax(-1)
    assert (moved[0, :25] == 0).all()
    assert (moved[1] == 0).all()
    assert (moved[0, 25:50] > 0).all()
    assert (moved[0, 50:] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_both_entry_points_equal_cross_entropy_on_the_logits(tied):
    llama = tiny(tie_word_embeddings=tied)
    batch = pack(windows(), bos=1)
    batch = batch._replace(loss_weights=torch.rand(batch.labels.shape) * batch.loss_weights)
    logits = llama.logits(batch).flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels.flatten(), reduction="none").view(2, 60)
    grads = torch.autograd.grad((expected * batch.loss_weights).sum(), list(llama.parameters()))
    nats = llama(batch)
    loss, detached = llama.loss(batch)
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(detached, expected, atol=1e-5, rtol=1e-5)
    for total in ((nats * batch.loss_weights).sum(), loss):
        found = torch.autograd.grad(total, list(llama.parameters()))
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@all_schemes
@torch.no_grad()
def test_a_cache_changes_nothing(position):
    llama = tiny(position, num_key_value_heads=2)
    ids = torch.randint(3, 97, (2, 30))
    whole = llama.logits(reading(ids))
    cache = Cache(2, planned=30)
    parts = [llama.logits(reading(ids[:, :11]), cache)]
    parts.append(llama.logits(reading(ids[:, 11:28], cache.length), cache))
    parts += [llama.logits(reading(ids[:, i : i + 1], i), cache) for i in (28, 29)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


def test_a_cache_refuses_packed_rows():
    with pytest.raises(ValueError, match="one document per row"):
        tiny().logits(pack(windows(), bos=1), Cache(2))


@pytest.mark.parametrize("position", [SCHEMES[3], SCHEMES[6]], ids=lambda p: type(p).__name__)
def test_a_cache_must_know_the_length_where_the_scheme_depends_on_it(position):
    with pytest.raises(ValueError, match=r"planned=prompt \+ new tokens"):
        tiny(position).logits(reading(torch.randint(3, 97, (1, 5))), Cache(2))


def test_a_scheme_is_one_file():
    """The README's three steps, for a toy: the farther a key, the darker."""
    llama = tiny(Fading(0.5))
    ids = torch.randint(3, 97, (1, 12))
    assert llama.logits(reading(ids)).isfinite().all()
    layer = llama.position.layer(1, 4)
    q = torch.zeros(1, 12, 1, 4)
    wide_q, wide_k = layer(q, q, llama.position.encode(torch.arange(12)[None], 4))
    scores = torch.einsum("bqhd,bkhd->qk", wide_q, wide_k)
    places = torch.arange(12.0)
    torch.testing.assert_close(scores, 0.5 * (places[None] - places[:, None]))
    packed = pack(torch.tensor([[1, 5, 6, 1, 7, 8, 9]]), bos=1)
    alone = pack(torch.tensor([[1, 7, 8, 9]]), bos=1)
    torch.testing.assert_close(llama(packed)[0, 3:], llama(alone)[0])


class Fade(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, q, k, code):
        place = code.unsqueeze(2)
        one = torch.ones_like(place)
        wide_q = [q, (-self.slope * place).expand(*q.shape[:3], 1), one.expand(*q.shape[:3], 1)]
        wide_k = [k, one.expand(*k.shape[:3], 1), (self.slope * place).expand(*k.shape[:3], 1)]
        return torch.cat(wide_q, -1), torch.cat(wide_k, -1)


@dataclass(frozen=True)
class Fading(PositionScheme):
    """Scores lose `slope` for every token of distance."""

    slope: float

    def encode(self, position_ids, head_dim, documents=None):
        return position_ids.unsqueeze(-1).float()

    def layer(self, num_heads, head_dim):
        return Fade(self.slope)


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size 50 is no multiple of num_attention_heads 4"):
        LlamaConfig(97, 50, 80, 2, 4)
    with pytest.raises(ValueError, match=r"num_attention_heads 4 is no multiple of .* 3"):
        LlamaConfig(97, 48, 80, 2, 4, 3)


def test_random_weights_depend_on_name_and_seed_alone():
    shape = torch.Size([64, 64])
    a = initial_weight("model.layers.0.mlp.up_proj.weight", shape, 8, seed=0)
    assert torch.equal(a, initial_weight("model.layers.0.mlp.up_proj.weight", shape, 8, seed=0))
    assert not torch.equal(a, initial_weight("model.layers.1.mlp.up_proj.weight", shape, 8, seed=0))
    assert not torch.equal(a, initial_weight("model.layers.0.mlp.up_proj.weight", shape, 8, seed=1))
    down = initial_weight("model.layers.0.mlp.down_proj.weight", shape, 8, seed=0)
    assert a.std() == pytest.approx(0.02, rel=0.05)
    assert down.std() == pytest.approx(0.02 / 4, rel=0.05)
