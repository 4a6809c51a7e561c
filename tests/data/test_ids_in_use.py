"""A vocabulary may be larger than the model's embedding if no data uses the ids beyond it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lit_longctx import manifest
from lit_longctx.data.finetuning import ChatSource, FinetuneData
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.making.scale import join
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.opening import check_tokenizer, open_tokenizer, tokenizer_info

ROWS = 90
"""Of the model's embedding; the tokenizer's ids go up to 99, as if one were an unused [PAD]."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 100)}}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


def prepared(folder, tokenizer, documents, **settings):
    folder.mkdir()
    rows = [{"text": " ".join(f"w{i}" for i in ids)} for ids in documents]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    prepare(str(folder / "a.jsonl"), str(out), str(tokenizer), **settings)
    return out


def documents(most, seed=0):
    """Random ids of which `most` is the largest, once."""
    found = np.random.default_rng(seed).integers(2, most, (8, 300))
    found[5, 17] = most
    return found.tolist()


@pytest.mark.parametrize("most", [50, 89, 90, 99])
def test_what_is_refused_are_ids_that_are_in_use(tmp_path, tokenizer, most):
    out = prepared(tmp_path / "a", tokenizer, documents(most), held_out=0.3)
    stored = [Windows(out, split, 256) for split in ("train", "held_out")]
    largest = max(int(windows.read(0, windows.tokens).max()) for windows in stored)
    assert stored[0].tokenizer == replace(
        tokenizer_info(open_tokenizer(str(tokenizer))), largest_id=most
    )
    assert largest == most
    data = PretrainData({"a": Source(str(out))}, 256, 256)
    if most < ROWS:
        check_tokenizer(data.tokenizer, ROWS, tokenizer)
        return
    expected = rf"vocabulary of 100, larger than the model's 90, and uses id {most}; prepare"
    with pytest.raises(ValueError, match=expected):
        check_tokenizer(data.tokenizer, ROWS, tokenizer)


def test_several_sources_use_what_each_of_them_uses(tmp_path, tokenizer):
    folders = {
        f"{most}": prepared(tmp_path / f"{most}", tokenizer, documents(most)) for most in (40, 60)
    }
    sources = {name: Source(str(folder)) for name, folder in folders.items()}
    assert PretrainData(sources, 256, 256).tokenizer.largest_id == 60


def test_older_folders_need_the_whole_vocabulary(tmp_path, tokenizer):
    out = prepared(tmp_path / "a", tokenizer, documents(50))
    shutil.copytree(out, tmp_path / "old")
    content = manifest.read(out)
    for split in content["splits"].values():
        del split["largest_id"]
    del content["files"]
    (tmp_path / "old/manifest.json").unlink()
    manifest.seal(tmp_path / "old", manifest.hash_files(tmp_path / "old"), **content)
    sources = {name: Source(str(folder)) for name, folder in (("a", out), ("b", tmp_path / "old"))}
    for chosen in (["b"], ["a", "b"], ["b", "a"]):
        data = PretrainData({name: sources[name] for name in chosen}, 256, 256)
        with pytest.raises(ValueError, match=r"vocabulary of 100, larger than the model's 90; pre"):
            check_tokenizer(data.tokenizer, ROWS, tokenizer)


def test_parts_and_conversations(tmp_path, tokenizer):
    for part, most in enumerate((40, 60)):
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(
                json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n"
                for ids in documents(most)
            )
        )
    rows = str(tmp_path / "*.jsonl")
    for part in range(2):
        prepare(rows, str(tmp_path / f"part {part}"), str(tokenizer), part=part, parts=2)
    join([tmp_path / f"part {part}" for part in range(2)], tmp_path / "joined")
    assert Windows(tmp_path / "joined", "train", 256).tokenizer.largest_id == 60

    messages = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w77"}]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": messages}))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %} {{ message.content }} {{ eos_token }}{% endfor %}"
    )
    chat = {"chat": True, "chat_template": str(template), "held_out": 0}
    prepare(str(tmp_path / "chat.json"), str(tmp_path / "chat"), str(tokenizer), **chat)
    data = FinetuneData({"a": ChatSource(str(tmp_path / "chat"))}, 256, 256)
    assert data.tokenizer.largest_id == 77
