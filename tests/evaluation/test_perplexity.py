"""SlidingWindowNats windows against the loop of YaRN's evaluation over transformers' own loss."""

import math

import numpy as np
import pytest
import torch

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.evaluation.loss.perplexity import (
    SlidingWindowNats,
    perplexity,
    sliding_window_nats,
)
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(97, 32, 48, 2, 4), RoPE())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def theirs(llama, tmp_path_factory):
    folder = export_pretrained(llama, tmp_path_factory.mktemp("exported") / "out")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def document(tokens, seed=0):
    return np.random.default_rng(seed).integers(3, 97, tokens)


@torch.no_grad()
def by_transformers(model, ids, window, stride, bos=()):
    """Means of windows as YaRN's eval/perplexity.py takes them: labels but for the new are −100.

    Where the tokenizer has a BOS, it stands before every window of one token less.
    """
    means, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window - len(bos), len(ids))
        inputs = torch.tensor([*bos, *ids[begin:end]])[None]
        labels = inputs.clone()
        labels[:, : -(end - previous)] = -100
        means.append(float(model(inputs, labels=labels).loss))
        previous = end
        if end == len(ids):
            break
    return means


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(300, 64, 16), (300, 64, 64), (50, 64, 16), (129, 64, 1)]
)
def test_windows_are_those_of_the_papers_code(llama, theirs, tokens, window, stride):
    ids = document(tokens)
    found = sliding_window_nats(llama, ids, window, stride)
    expected = by_transformers(theirs, ids, window, stride)
    np.testing.assert_allclose(found.means, expected, rtol=1e-5)
    paper = perplexity([found], mode="paper")
    assert paper == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(300, 64, 16), (300, 64, 63), (50, 64, 16), (1, 64, 16)]
)
def test_bos_before_every_window_as_in_the_papers_code(llama, theirs, tokens, window, stride):
    ids = document(tokens)
    found = sliding_window_nats(llama, ids, window, stride, bos=1)
    expected = by_transformers(theirs, ids, window, stride, bos=[1])
    np.testing.assert_allclose(found.means, expected, rtol=1e-5)
    assert sum(found.targets) == tokens


def test_every_token_but_the_first_is_a_target_once(llama):
    for tokens, window, stride in ((300, 64, 16), (64, 64, 16), (65, 64, 16), (200, 64, 48)):
        assert (
            sum(sliding_window_nats(llama, document(tokens), window, stride).targets) == tokens - 1
        )


def test_token_mode_is_the_mean_over_all_targets(llama, theirs):
    """Windows of stride 1 beyond the first: every target's nats from transformers' logits."""
    texts = [document(70), document(90, seed=1)]
    nats = []
    for ids in texts:
        for place in range(1, len(ids)):
            begin = max(0, place + 1 - 64)
            with torch.no_grad():
                logits = theirs(torch.tensor(ids[begin:place])[None]).logits[0, -1]
            nats.append(-float(logits.log_softmax(-1)[ids[place]]))
    found = perplexity([sliding_window_nats(llama, ids, 64, 1) for ids in texts])
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_bits_per_byte():
    assert SlidingWindowNats([math.log(2) * 3], [4]).bits_per_byte("éé…") == pytest.approx(12 / 7)


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "message"),
    [
        (1, 64, 16, "a document of 1 tokens has no target"),
        (9, 64, 65, "stride 65 must be between 1 and the window of 64"),
        (9, 64, 0, "stride 0 must be between"),
    ],
)
def test_what_cannot_be_is_refused(llama, tokens, window, stride, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_nats(llama, document(tokens), window, stride)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode 'words' unknown"):
        perplexity([SlidingWindowNats([1.0], [1])], mode="words")
