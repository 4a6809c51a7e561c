"""`lit_longctx import` of models of transformers, written as llama.cpp's converter does."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import gguf
import gguf_files
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.checkpoint.gguf import GGUF, import_gguf, pre_tokenizer
from lit_longctx.cli import main
from lit_longctx.decoding import reading

IDS = torch.arange(3, 43).reshape(1, -1)


def theirs(model):
    with torch.no_grad():
        return model(IDS).logits


def ours(folder):
    llama = load_pretrained(folder)
    with torch.no_grad():
        return llama.logits(reading(IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_were_converted(tmp_path, tied):
    model = gguf_files.llama(tied)
    file = gguf_files.write(tmp_path / "model.gguf", model)
    folder = import_gguf(str(file), str(tmp_path / "folder"))
    torch.testing.assert_close(ours(folder), theirs(model), rtol=1e-4, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_quantized_weights_are_read_as_transformers_reads_them(tmp_path):
    quantized = gguf.GGMLQuantizationType.Q4_1
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.llama(), quantized=quantized)
    folder = import_gguf(str(file), str(tmp_path / "folder"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_tokenizer_template_and_ends_come_along(tmp_path):
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.llama())
    folder = import_gguf(str(file), str(tmp_path / "folder"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the  2<|im_end|>").input_ids) == [
        *("the", "ĠĠ", "2", "<|im_end|>")
    ]  # no BOS; blanks are cut off before a digit
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert said == "<|im_start|>user\nthe<|im_end|>\n"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_smollm_cuts_text_as_llama_cpp_does():
    # llama.cpp, src/llama-vocab.cpp: first each \p{N}, then GPT-2's expression
    pieces = [p for p, _ in pre_tokenizer("digits").pre_tokenize_str("it's x = [  10,\n   y]")]
    assert pieces == ["it", "'s", "Ġx", "Ġ=", "Ġ[", "ĠĠ", "1", "0", ",", "ĊĠĠ", "Ġy", "]"]


def test_llama3_is_told_by_its_factors(tmp_path):
    settings = {"rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", **settings, "original_max_position_embeddings": 8192}
    model = gguf_files.llama(rope_parameters=rope, max_position_embeddings=131_072)
    plain = gguf_files.llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    factors = [LlamaRotaryEmbedding(each.config).inv_freq for each in (plain, model)]
    tensors = {"rope_freqs.weight": (factors[0] / factors[1]).numpy()}
    file = gguf_files.write(tmp_path / "model.gguf", model, tensors=tensors)
    folder = import_gguf(str(file), str(tmp_path / "folder"))
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert read.config.rope_parameters == rope
    torch.testing.assert_close(ours(folder), theirs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "qwen2"}, "architecture 'qwen2'"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count 8"),
        ({"keys": {"llama.rope.scaling.attn_factor": 2.0}}, "llama.rope.scaling.attn_factor 2"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope"),
        ({"keys": {"split.count": 2}}, "one of several files"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken'"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(128, np.float32)}}, "blk.0.attn_q.bias"),
        ({"tensors": {"rope_freqs.weight": np.full(16, 2, np.float32)}}, "rope_freqs.weight"),
    ],
)
def test_what_is_no_llama_here_is_refused_by_name(tmp_path, capsys, changes, named):
    file = gguf_files.write(tmp_path / "model.gguf", gguf_files.llama(), **changes)
    assert main(["import", "--gguf", str(file), "--output", str(tmp_path / "folder")]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "folder").exists()


def test_torn_files_are_refused(tmp_path):
    whole = gguf_files.write(tmp_path / "model.gguf", gguf_files.llama()).read_bytes()
    torn = tmp_path / "torn.gguf"
    for length in (3, 100, len(whole) // 2):
        torn.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"torn\.gguf is torn or no GGUF file"):
            GGUF(torn)
