"""Attention score: the formula in plain Python, attention against transformers' own."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from differences import assert_near

from lit_longctx import cli, manifest
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.making.attention_dependency import (
    AttentionFilter,
    AttentionScorer,
    attention_score,
    watched,
)
from lit_longctx.data.making.prepare import prepare
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import RoPE

transformers = pytest.importorskip("transformers")
SETTINGS: dict[str, Any] = {
    "window": 64,
    "span": 8,
    "far": 2,
    "compute_dtype": "float32",
    "device": "cpu",
}


def llama(window: int | None = None) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        258, 32, 64, 3, 4, 2, bos_token_id=256, eos_token_id=257,
        model_type="mistral" if window else "llama",
    )  # fmt: skip
    model = Llama(config, Layers((LayerKind(RoPE(), window),), (0, 0, 0)))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.mark.parametrize("far", [1, 2, 4])
def test_score_in_plain_python(far: int):
    shares = np.tril(np.random.default_rng(0).random((7, 7)))
    shares /= shares.sum(axis=1, keepdims=True)
    rows = [sum(shares[j, i] * (j - i) / 6 for i in range(j - far + 1)) for j in range(far, 7)]
    assert attention_score(shares, far) == pytest.approx(sum(rows) / len(rows), rel=1e-12)
    first = np.zeros((7, 7))
    first[:, 0] = 1
    assert attention_score(first, 6) == 1  # the largest there is
    assert attention_score(np.eye(7), far) == 0


@pytest.mark.parametrize("window", [None, 20])
def test_attention_is_that_of_transformers(window: int | None, tmp_path):
    model = llama(window)
    folder = str(export_pretrained(model, tmp_path / "exported"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attentions = theirs(ids, output_attentions=True).attentions
        with watched(model, 8) as found:
            hidden = model.hidden(reading(ids))
        plain = model.hidden(reading(ids))
    mean = torch.stack(attentions).mean(dim=(0, 1, 2)).view(8, 8, 8, 8).sum(3).mean(1)
    assert found.sums is not None
    assert found.layers == 3
    assert_near("attention between spans", found.sums / 3, mean, atol=1e-6)
    assert_near("attention: hidden states", hidden, plain, atol=0)


def test_documents_are_the_mean_of_their_windows(tmp_path):
    folder = str(export_pretrained(llama(), tmp_path / "exported"))
    scorer = AttentionScorer(AttentionFilter(folder, 0.0, **SETTINGS))
    ids = np.random.default_rng(2).integers(0, 256, size=150).astype(np.uint16)
    parts = [scorer.score(part) for part in (ids[:64], ids[64:128])]
    assert scorer.score(ids) == pytest.approx(sum(parts) / 2)  # the rest is two spans: too few
    parts.append(scorer.score(ids[128:]))
    assert parts[2] == 0
    assert 0 < min(parts[:2]) < 1


@pytest.mark.slow
def test_prepare_keeps_what_scores_and_reports(tmp_path):
    folder = str(export_pretrained(llama(), tmp_path / "exported"))
    generator = np.random.default_rng(3)
    texts = {str(i): "".join(generator.choice(list("abcdef"), 130)) for i in range(20)}
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    scorer = AttentionScorer(AttentionFilter(folder, 0.0, **SETTINGS))
    scores = [scorer.score(np.frombuffer(text.encode(), np.uint8)) for text in texts.values()]
    least = sorted(scores)[12]
    how = AttentionFilter(folder, least, **SETTINGS)
    given = {"held_out": 0, "attention_filter": how}
    prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), **given)
    found = manifest.read(tmp_path / "out")
    assert (found["filter"]["kept"], found["filter"]["dropped"]) == (8, 12)
    assert found["settings"]["attention_filter"]["at_least"] == least


@pytest.mark.parametrize(
    "settings", [{"span": 0}, {"far": 8}, {"window": 60}, {"far": 0}, {"at_least": 1.1}]
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=r"span|at_least"):
        AttentionFilter(**{"checkpoint": "nowhere", "at_least": 0.1, **SETTINGS, **settings})


def test_one_filter_at_a_time(tmp_path, capsys):
    options = ["prepare", "--input", "stdlib", "--output", str(tmp_path / "data")]
    for name in ("filter", "attention_filter"):
        options += [f"--{name}.checkpoint", "x", f"--{name}.at_least", "0.1"]
    assert cli.main(options) == 1
    assert "filter and attention_filter exclude each other" in capsys.readouterr().err
