"""Folders in both directions against transformers, and what is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_longctx import manifest
from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint, parameters
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE, TransformerXL

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 20, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
}


def randomised(llama):
    for name, parameter in llama.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return llama


def tiny(theta=500.0, **kind):
    return randomised(Llama(LlamaConfig(**SHAPE, **kind), RoPE(theta)))


@torch.no_grad()
def difference(folder, llama):
    """Largest logit difference between transformers on a folder and a Llama of ours."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (2, 50))
    return float((theirs(ids).logits - llama.logits(reading(ids))).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip(tmp_path, kind, sharded, monkeypatch):
    if sharded:
        monkeypatch.setattr(parameters, "SHARD_BYTES", 30_000)
    llama = tiny(**KINDS[kind])
    export_pretrained(llama, tmp_path / "out", ByteTokenizer(), context=8192)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 if sharded else True
    assert difference(tmp_path / "out", llama) <= 1e-5
    again = load_pretrained(tmp_path / "out")
    assert again.position == llama.position
    assert again.config.max_position_embeddings == 8192
    assert open_checkpoint(tmp_path / "out").trained_context == 8192
    for (name, a), (_, b) in zip(
        llama.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["50GB", "40KB"])
def test_folders_that_transformers_wrote(tmp_path, kind, shards):
    config = transformers.LlamaConfig(
        **SHAPE, **KINDS[kind], rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    theirs = randomised(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    llama = load_pretrained(tmp_path)
    assert llama.position == RoPE(5e5)
    assert difference(tmp_path, llama) <= 1e-5


def test_version_4_config_is_read(tmp_path):
    unsealed(export_pretrained(tiny(theta=1e6), tmp_path / "out"))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    del config["rope_parameters"]
    file.write_text(json.dumps(config))
    assert load_pretrained(tmp_path / "out").position == RoPE(1e6)


def test_the_exported_tokenizer_is_opened_by_transformers(tmp_path):
    export_pretrained(tiny(), tmp_path / "out", ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return 'é 中 🙂'  # <bos>x"
    assert tokenizer.bos_token_id == 256
    assert tokenizer(text[:-6], add_special_tokens=False)["input_ids"] == list(text[:-6].encode())
    assert tokenizer.decode(list(text.encode())) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    out = model.generate(torch.tensor([[256, 65, 66]]), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= 8


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path):
    export_pretrained(tiny(), tmp_path / "out", dtype=torch.bfloat16)
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def unsealed(folder):
    """A folder as other programs write it, without our manifest: its files may be changed."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    return folder


def edit(folder, **changes):
    file = unsealed(folder) / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "phi3"}, "model_type is 'phi3', expected one of llama, mistral,"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"vocab_size": None}, "vocab_size"),
        ({"intermediate_size": 81}, r"gate_proj.weight is \[80, 48\], expected \[81, 48\]"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, message):
    folder = export_pretrained(tiny(), tmp_path / "out")
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_torn_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "SHARD_BYTES", 30_000)
    folder = unsealed(export_pretrained(tiny(), tmp_path / "out"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is torn or no safetensors file"):
        load_pretrained(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}, named by .* is missing"):
        load_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not ours to unpickle")
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_pretrained(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = unsealed(export_pretrained(tiny(), tmp_path / "out"))
    save_file({"x": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"x": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere"):
        load_pretrained(folder)


def test_a_scheme_with_weights_starts_anew_from_a_rope_checkpoint(tmp_path):
    folder = export_pretrained(tiny(), tmp_path / "out")
    llama = load_pretrained(folder, TransformerXL())
    fresh = [n for n, _ in llama.named_parameters() if ".self_attn.position." in n]
    assert len(fresh) == 3 * 2
    layer = llama.model.layers[0].self_attn.position
    q = torch.zeros(1, 600, 4, 12)
    wide_q, wide_k = layer(q, q[:, :, :2], llama.position.encode(torch.arange(600)[None], 12))
    bias = (wide_q[0, 599, 0] * wide_k[0, :, 0]).sum(-1).flip(0) / 12**0.5  # by distance
    frequencies = RoPE(500.0).frequencies(12).double()  # the checkpoint's theta
    expected = 12 * torch.outer(torch.arange(600), frequencies).cos().mean(-1)
    torch.testing.assert_close(bias.double(), expected, atol=1e-4, rtol=0)


def test_export_refuses_what_hugging_face_cannot_say(tmp_path):
    llama = Llama(LlamaConfig(**SHAPE), TransformerXL())
    with pytest.raises(ValueError, match="cannot represent TransformerXL; train with a scheme"):
        export_pretrained(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_never_overwrites_and_leaves_nothing_half_done(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export_pretrained(tiny(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds none of tokenizer.json"):
        export_pretrained(tiny(), tmp_path / "new", tokenizer=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_chats_end_of_turn_ends_generation_after_export(tmp_path):
    """As transformers' GenerationConfig reads it: the template's token beside the checkpoint's."""
    rows = [{"instruction": f"Say {i}", "output": str(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], str(tmp_path / "chats"), chat=True)
    tokenizer = tmp_path / "chats" / "tokenizer"
    for name, ends in (("plain", 257), ("other", [7, 257])):
        if name == "other":
            (tokenizer / "generation_config.json").write_text('{"eos_token_id": [7]}')
        llama = Llama(LlamaConfig(**SHAPE), RoPE())
        folder = export_pretrained(llama, tmp_path / name, tokenizer)
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ends
        told = (folder / "chat_template.jinja").read_text()
        assert told == (tokenizer / "chat_template.jinja").read_text()
