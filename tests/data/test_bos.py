"""BOS stands only where the tokenizer puts it, as transformers has it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tokenizer import bpe, pieces
from tokenizers import processors

from lit_longctx import cli
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.making.mixture import Upsampling, mix
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Conversation, Message
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer, Tokenizer
from lit_longctx.evaluation.evaluate import haystack
from lit_longctx.evaluation.retrieval.registry import TASKS, task_named
from lit_longctx.generate import generate_text
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

TEXTS = ["the quick brown fox", " <s> b", "a"]
FILES = {
    "none": None,
    "bos": "<s> $A",
    "both": "<s> $A </s>",
    "eos": "$A </s>",
    "other": "<pad> $A",
}
CONFIGS = {
    "silent": {},
    "true": {"add_bos_token": True},
    "false": {"add_bos_token": False},
    "null": {"add_bos_token": None},
    "eos alone": {"add_eos_token": False},
    "both": {"add_bos_token": True, "add_eos_token": True},
}


def saved(folder: Path, single: str | None, **config) -> str:
    """A tokenizer whose post-processor writes `single`."""
    model = bpe()
    special = [(token, model.token_to_id(token)) for token in ("<s>", "</s>", "<pad>")]
    model.post_processor = None  # pyright: ignore
    if single:
        model.post_processor = processors.TemplateProcessing(single, special_tokens=special)  # pyright: ignore
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return str(folder)


def theirs_of(folder: str):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def prompt_ids(coder: Tokenizer, text: str) -> list[int]:
    return [*coder.prefix, *coder.encode([text])[0].tolist()]


def compare(folder: str, texts: list[str] = TEXTS) -> bool:
    """Ids are those of transformers, but for an EOS at the end and special tokens in the text."""
    ours, theirs = open_tokenizer(folder), theirs_of(folder)
    for text in texts:
        expected = theirs(text, split_special_tokens=True)["input_ids"]
        if expected[-1] == ours.eos:
            expected = expected[:-1]
        assert prompt_ids(ours, text) == expected, (text, ours.bos_rule)
    return ours.bos_rule.added


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("file", FILES)
def test_prompts_begin_as_in_transformers(tmp_path: Path, file: str, config: str):
    added = compare(saved(tmp_path / "t", FILES[file], **CONFIGS[config]))
    assert added == (file in ("bos", "both", "other"))


@pytest.mark.parametrize("file", ["none", "eos", "bos"])
def test_prompts_begin_as_in_transformers_where_bos_is_eos(tmp_path: Path, file: str):
    single = (FILES[file] or "").replace("<s>", "</s>") or None
    assert compare(saved(tmp_path / "t", single, bos_token="</s>")) == (file == "bos")


@pytest.mark.parametrize("added", [True, False])
def test_sentencepiece_begins_as_in_transformers(tmp_path: Path, added: bool):
    (tmp_path / "tokenizer.model").write_bytes(pieces())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = TEXTS[:1]  # spaces in front are another matter
    assert compare(str(tmp_path), texts) == added


def test_sentencepiece_alone_begins_with_bos(tmp_path: Path):
    """As transformers' LlamaTokenizer says of its default, and did until version 5."""
    (tmp_path / "tokenizer.model").write_bytes(pieces())
    coder = open_tokenizer(str(tmp_path))
    assert coder.prefix == [coder.bos]
    (tmp_path / "saved").mkdir()
    coder.save(tmp_path / "saved")
    assert compare(str(tmp_path / "saved"), TEXTS[:1])


def test_saved_bytes_begin_as_in_transformers(tmp_path: Path):
    for name, coder in (
        ("with", ByteTokenizer()),
        ("without", open_tokenizer("bytes", add_bos=False)),
    ):
        (tmp_path / name).mkdir()
        coder.save(tmp_path / name)
        assert compare(str(tmp_path / name)) == (name == "with")


def test_what_is_asked_for_is_saved_so_that_transformers_does_it_too(tmp_path: Path):
    for name, single in FILES.items():
        for add_bos in (True, False):
            folder = saved(tmp_path / name, single)
            coder = open_tokenizer(folder, add_bos=add_bos)
            again = tmp_path / f"{name}-{add_bos}"
            again.mkdir()
            coder.save(again)
            assert compare(str(again)) is add_bos
            reopened = open_tokenizer(str(again))
            assert (reopened.bos, reopened.fingerprint) == (coder.bos, coder.fingerprint)


def test_bos_may_be_nothing(tmp_path: Path):
    """As with Qwen: the config says that there is none, and EOS fills the last block."""
    folder = saved(tmp_path / "t", None, bos_token=None)
    coder = open_tokenizer(folder)
    assert (coder.prefix, coder.bos, coder.eos) == ([], 2, 2)
    assert compare(folder) is False
    with pytest.raises(ValueError, match="names no BOS token; pass --bos TOKEN"):
        open_tokenizer(folder, add_bos=True)
    assert open_tokenizer(folder, bos="<s>").prefix == [1]


def test_two_tokens_in_front_are_refused(tmp_path: Path):
    folder = saved(tmp_path / "t", "<pad> <s> $A")
    with pytest.raises(ValueError, match=r"puts <pad> <s> before a text; expected BOS; pass --add"):
        open_tokenizer(folder)
    assert open_tokenizer(folder, add_bos=True).prefix == [1]


LINES = ["the quick brown fox jumps over the lazy dog " * n for n in (1, 3, 20, 2, 40)]


def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in LINES))
    return str(file)


@pytest.mark.parametrize(
    ("single", "options", "begins", "why"),
    [
        (None, {}, [], "begins no document (tokenizer.json's post-processor)"),
        ("<s> $A", {}, [1], "begins every document (tokenizer.json's post-processor)"),
        (None, {"add_bos": True}, [1], "begins every document (--add_bos true)"),
        ("<s> $A", {"add_bos": False}, [], "begins no document (--add_bos false)"),
        (None, {"bos": "<s>"}, [1], "begins every document (--bos)"),
        (None, {"bos": "<s>", "add_bos": False}, [], "begins no document (--add_bos false)"),
    ],
    ids=str,
)
def test_documents_begin_as_prompts_do(tmp_path: Path, capsys, single, options, begins, why):
    folder = saved(tmp_path / "t", single)
    out = str(tmp_path / "out")
    content = prepare(rows(tmp_path), out, folder, held_out=0, chunk_tokens=512, **options)
    source = "--bos" if "bos" in options else "tokenizer_config.json"
    printed = capsys.readouterr().out
    assert f"BOS 1 '<s>' (from {source}) {why}\n" in printed
    assert "EOS 2 '</s>' (from tokenizer_config.json) ends every document\n" in printed
    ids = [i.tolist() for i in open_tokenizer(folder).encode(LINES)]
    flat = [token for text in ids for token in (*begins, *text, 2)]
    windows = Windows(out, "train", 256)
    assert windows.read(0, len(flat)).tolist() == flat
    assert windows.document_lengths().tolist() == [len(begins) + len(text) + 1 for text in ids]
    ledger = content["splits"]["train"]
    assert ledger["boundary_tokens"] == len(LINES) * (len(begins) + 1)
    assert ledger["text_tokens"] == sum(map(len, ids))
    assert content["tokenizer"].get("add_bos", True) == bool(begins)
    assert open_tokenizer(f"{out}/tokenizer").prefix == begins


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_documents_without_bos_are_learnt_but_for_their_first_token(tmp_path: Path, packing):
    out = str(tmp_path / "out")
    prepare(rows(tmp_path), out, saved(tmp_path / "t", None), held_out=0)
    data = PretrainData({"a": Source(out)}, window=256, batch_tokens=256, packing=packing)
    readers = dict(enumerate(data.readers(data.stage_schedule.stages[0]).values()))
    batches = [data.batch(readers, [(0, i, i)], True) for i in range(len(readers[0]))]
    targets = sum(int((batch.labels >= 0).sum()) for batch in batches)
    ends = sum(int((batch.labels == 2).sum()) for batch in batches)
    firsts = {ids[0] for ids in open_tokenizer(str(tmp_path / "t")).encode(LINES)}
    lengths = [len(ids) for ids in open_tokenizer(str(tmp_path / "t")).encode(LINES)]
    if packing == "best_fit":
        assert (targets, ends) == (sum(lengths), len(LINES))  # EOS, and all but the first
    else:
        assert len(batches) == 2  # the last document's end is dropped
        assert (targets, ends) == (2 * 256 - 4, 4)
        starts = batches[0].documents.boundaries[:5].tolist()
        assert set(batches[0].input_ids[0, starts].tolist()) <= firsts


def test_a_mix_keeps_documents_without_bos_whole(tmp_path: Path):
    out = str(tmp_path / "out")
    prepare(rows(tmp_path), out, saved(tmp_path / "t", None), held_out=0)
    mix({"a": out}, str(tmp_path / "mix"), Upsampling("none"))
    before, after = Windows(out, "train", 256), Windows(tmp_path / "mix/a", "train", 256)
    assert after.read(0, after.tokens).tolist() == before.read(0, before.tokens).tolist()
    assert after.manifest.splits["train"] == before.manifest.splits["train"]


@pytest.mark.slow
def test_probes_begin_as_the_data_does(tmp_path: Path):
    """Also in folders of the time when all documents began with BOS and nothing was recorded."""
    folder = saved(tmp_path / "t", None)
    for name, options in (("without", {}), ("with", {"add_bos": True})):
        out = str(tmp_path / name)
        prepare(rows(tmp_path), out, folder, held_out=0, **options)
        held = Windows(out, "train", 256)
        hay = haystack(held, 1000)
        assert [line.strip() for line in hay.text.split("\n") if line.strip()] == [
            text.strip() for text in LINES
        ]
        for task in TASKS:
            try:
                sample = task_named(task).sample(hay, 2000)
            except ValueError as error:
                assert "no sentence of" in str(error)  # noqa: PT017
                continue
            assert len(sample.prompt_ids) == 2000
            assert (sample.prompt_ids == 1).nonzero()[0].tolist() == [0] * (name == "with")
        earlier = held.manifest.tokenizer.as_json()  # versions that recorded no add_bos
        earlier.pop("add_bos", None)
        held.manifest = replace(held.manifest, tokenizer=TokenizerInfo.from_json(earlier))
        assert haystack(held, 1000).tokenizer.prefix == [1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A small model with a tokenizer that adds no BOS."""
    folder = saved(tmp_path / "t", None)
    config = LlamaConfig(600, 32, 48, 2, 2, bos_token_id=1, eos_token_id=2)
    llama = Llama(config, RoPE(100.0))
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    export_pretrained(llama, tmp_path / "hf", tokenizer=folder)
    return str(tmp_path / "hf")


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(checkpoint: str, capsys):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    coder = theirs_of(checkpoint)
    for prompt in ("the quick brown", "a b c", "dog jumps"):
        given = coder(prompt, return_tensors="pt")
        found = theirs.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = found[0, given["input_ids"].shape[1] :]
        expected = prompt + coder.decode(new, skip_special_tokens=True)
        assert generate_text(checkpoint, prompt, 12) == expected
        forced_bos = generate_text(checkpoint, prompt, 12, add_bos=True)
        assert forced_bos != expected
    options = ["--checkpoint", checkpoint, "--prompt", prompt, "--max_new_tokens", "12"]
    capsys.readouterr()
    for value, text in (("auto", expected), ("true", forced_bos), ("false", expected)):
        assert cli.main(["generate", *options, "--add_bos", value]) == 0
        assert capsys.readouterr().out == f"{text}\n"


def test_a_chat_begins_with_bos_only_where_the_tokenizer_adds_it(tmp_path: Path):
    chatml = "{% for m in messages %}<pad>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    chat = Conversation((Message("user", "Why?"), Message("assistant", "Because.")), "", "")
    for single, begins in ((None, [3]), ("<s> $A", [1, 3])):
        folder = saved(tmp_path / "t", single, chat_template=chatml)
        rendered = ChatTemplate(open_tokenizer(folder)).render(chat)
        pad = open_tokenizer(folder).model.token_to_id("<pad>")  # pyright: ignore
        assert rendered.ids[: len(begins)].tolist() == [*begins[:-1], pad]
