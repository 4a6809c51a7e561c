"""Stored tensors that a model has no use for, or twice: compared before they are dropped."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit, tiny, unsealed

from lit_longctx.checkpoint import export_pretrained, load_pretrained, parameters
from lit_longctx.decoding import reading

transformers = pytest.importorskip("transformers")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder, change):
    """Change the tensors of a single file."""
    weights = load_file(unsealed(folder) / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def assert_same_as_transformers(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    ours = load_pretrained(folder).logits(reading(ids))
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_equal_head_and_stored_frequencies_are_dropped(tmp_path):
    folder = export_pretrained(tiny(tie_word_embeddings=True), tmp_path / "out")

    def add(weights):
        weights[HEAD] = weights[EMBEDDING].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)

    rewrite(folder, add)
    assert_same_as_transformers(folder)


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    folder = export_pretrained(tiny(tie_word_embeddings=True), tmp_path / "out")
    rewrite(folder, lambda weights: weights.update({HEAD: -weights[EMBEDDING]}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is"):
        load_pretrained(folder)
    edit(folder, tie_word_embeddings=False)  # as the message says
    assert_same_as_transformers(folder)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with an index and its shards, and a single file of the same model beside it."""
    llama = tiny()
    single = export_pretrained(llama, tmp_path / "single")
    monkeypatch.setattr(parameters, "SHARD_BYTES", 30_000)
    folder = export_pretrained(llama, tmp_path / "out")
    (folder / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    return folder


def test_a_single_file_beside_an_index_with_the_same_weights_is_read(beside):
    assert_same_as_transformers(beside)


def test_a_single_file_beside_an_index_with_other_weights_is_refused(beside):
    rewrite(beside, lambda weights: weights["model.norm.weight"].add_(1.0))
    message = r"and model.safetensors hold model.norm.weight with other values; remove the file"
    with pytest.raises(ValueError, match=message):
        load_pretrained(beside)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, dtype):
    folder = export_pretrained(tiny(), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 8})
    with pytest.raises(ValueError, match=r"up_proj.weight is of dtype .*quantization_config"):
        load_pretrained(folder)


def test_shards_without_their_index_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "SHARD_BYTES", 30_000)
    folder = export_pretrained(tiny(), tmp_path / "out")
    (unsealed(folder) / "model.safetensors.index.json").unlink()
    message = r"holds model-00001-of-.* but no model.safetensors.index.json, which says what"
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_an_index_may_name_the_single_file(tmp_path):
    folder = export_pretrained(tiny(), tmp_path / "out")
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_as_transformers(folder)
