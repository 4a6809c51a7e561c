import hashlib
import json
import random
import struct
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import torch
from litdata import StreamingDataset, TokensLoader
from tokenizers import models, pre_tokenizers

from lit_longctx import cli, manifest
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.making import prepare as module
from lit_longctx.data.making.dependency import DependencyFilter, DependencyScorer
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.store.chunks import SplitWriter
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.tokenizer import ByteTokenizer, Tokenizer
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

BOS, EOS, BLOCK = 256, 257, 256


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in texts.items()))


def random_texts(lengths, seed=0):
    """Texts of so many bytes, of one to four bytes per letter, by name."""
    generator = random.Random(seed)
    letters = {1: "abc ", 2: "éß", 3: "中文", 4: "😀"}
    texts = {}
    for i, length in enumerate(lengths):
        text = "x"
        left = length - 1
        while left:
            size = generator.choice([s for s in letters if s <= left])
            text += generator.choice(letters[size])
            left -= size
        texts[f"document {i}"] = text
    return texts


def held_out_share(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16


def stream(texts):
    """What a split of these documents has to hold."""
    flat = [token for text in texts for token in (BOS, *text.encode(), EOS)]
    return flat + [BOS] * (-len(flat) % BLOCK)


def chunk(path, dtype=np.uint16):
    """Tokens of a chunk file, read without litdata: number of items, their offsets, the tokens."""
    content = path.read_bytes()
    items = struct.unpack_from("<I", content)[0]
    return np.frombuffer(content, dtype, offset=4 + 4 * (items + 1)).tolist()


def chunks(folder, split, dtype=np.uint16):
    number = len(list((folder / split).glob("*.bin")))
    return [chunk(folder / split / f"chunk-0-{i}.bin", dtype) for i in range(number)]


def flat(folder, split, dtype=np.uint16):
    return [token for tokens in chunks(folder, split, dtype) for token in tokens]


def split_at_bos(tokens):
    """Documents' texts of a stored stream; the filling of the last block holds none."""
    begins = [i for i, token in enumerate(tokens) if token == BOS] + [len(tokens)]
    documents = [tokens[a + 1 : b] for a, b in pairwise(begins)]
    while documents and not documents[-1]:
        documents.pop()
    assert all(document[-1] == EOS and EOS not in document[:-1] for document in documents)
    return [bytes(document[:-1]).decode() for document in documents]


@pytest.mark.slow
def test_a_thousand_documents_are_stored_and_counted_exactly(tmp_path):
    generator = random.Random(0)
    lengths = [generator.randint(1, 5000) for _ in range(1000)]
    lengths[::300] = [50_000] * 4
    lengths[1], lengths[2], lengths[3] = 1, 254, 255
    texts = random_texts(lengths)
    write_rows(tmp_path / "a.jsonl", texts)
    content = prepare(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), held_out=0.1, chunk_tokens=2**15
    )
    assert manifest.verify(tmp_path / "out") == {
        **content,
        "files": manifest_files(tmp_path / "out"),
    }
    held = {name for name in texts if held_out_share(name) < 0.1}
    assert 60 < len(held) < 140
    for split, chosen in (("held_out", True), ("train", False)):
        mine = [text for name, text in texts.items() if (name in held) == chosen]
        expected = stream(mine)
        stored = chunks(tmp_path / "out", split)
        assert {len(tokens) for tokens in stored[:-1]} == {2**15}
        assert len(stored[-1]) % BLOCK == 0
        assert 0 < len(stored[-1]) <= 2**15
        tokens = [token for part in stored for token in part]
        assert tokens == expected
        assert split_at_bos(tokens) == mine

        ledger = content["splits"][split]
        sizes = [len(text.encode()) for text in mine]
        assert ledger["documents"] == len(mine)
        assert ledger["text_tokens"] == sum(sizes)
        assert ledger["boundary_tokens"] == 2 * len(mine)
        assert (
            ledger["tokens"]
            == len(expected)
            == sum(ledger[key] for key in ("text_tokens", "boundary_tokens", "padding"))
        )
        assert ledger["chunks"] == len(stored)
        assert ledger["lengths"] == length_table(sizes)
        for length in (256, 512, 768, 4096, 2**15):
            windows = Windows(tmp_path / "out", split, length)
            assert len(windows) == len(range(length, len(expected), length))
            assert len(expected) == len(windows) * length + windows.dropped
            assert 0 < windows.dropped <= length


def manifest_files(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    described = {
        path.relative_to(folder).as_posix(): {
            "bytes": len(content := path.read_bytes()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for path in paths
    }
    return dict(sorted(described.items()))


def length_table(text_sizes):
    """Rows of lower edge, documents, tokens, by a slow loop."""
    edges = [0, 1024, 2048, 4096, 8192, 16384, 32768]
    table = []
    for low, high in zip(edges, [*edges[1:], 65536], strict=True):
        inside = [size + 2 for size in text_sizes if low <= size + 2 < high]
        table += [[low, len(inside), sum(inside)]] if inside else []
    return table


def test_the_held_out_choice_depends_on_the_name_alone(tmp_path):
    old = {f"old {i}": f"text of old {i}" for i in range(300)}
    new = {f"new {i}": f"text of new {i}" for i in range(300)}
    mixed = list({**new, **old}.items())
    random.Random(1).shuffle(mixed)
    kept = []
    for name, texts in (
        ("few", old),
        ("many", dict(mixed)),
        ("other", dict.fromkeys(old, "other")),
    ):
        write_rows(tmp_path / f"{name}.jsonl", texts)
        prepare([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), held_out=0.2)
        kept.append(split_at_bos(flat(tmp_path / name, "held_out")))
    expected = [text for name, text in old.items() if held_out_share(name) < 0.2]
    assert kept[0] == expected
    assert len(expected) > 30
    assert sorted(text for text in kept[1] if "old" in text) == sorted(expected)
    assert len(kept[2]) == len(expected)


def test_more_held_out_keeps_what_was_held_out(tmp_path):
    texts = {f"{i}": f"text {i}" for i in range(300)}
    write_rows(tmp_path / "a.jsonl", texts)
    held = {}
    for share in (0.05, 0.3):
        out = tmp_path / str(share)
        prepare([str(tmp_path / "a.jsonl")], str(out), held_out=share)
        held[share] = set(split_at_bos(flat(out, "held_out")))
    assert held[0.05] < held[0.3]


def test_nothing_held_out(tmp_path):
    texts = {f"{i}": f"text {i}" for i in range(100)}
    write_rows(tmp_path / "a.jsonl", texts)
    content = prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), held_out=0)
    assert split_at_bos(flat(tmp_path / "out", "train")) == list(texts.values())
    assert content["splits"]["held_out"]["tokens"] == 0
    assert content["splits"]["held_out"]["chunks"] == 0
    assert len(Windows(tmp_path / "out", "held_out", 256)) == 0


@pytest.mark.parametrize("length", [1, 253, 254, 255, 510, 766, 1022, 1023])
def test_the_last_block_is_filled_up(tmp_path, length):
    write_rows(tmp_path / "a.jsonl", {"a": "x" * length})
    content = prepare(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), held_out=0, chunk_tokens=512
    )
    stored = chunks(tmp_path / "out", "train")
    blocks = -(-(length + 2) // 256)
    sizes = [512] * (blocks // 2) + [256] * (blocks % 2)
    assert [len(tokens) for tokens in stored] == sizes
    assert content["splits"]["train"]["padding"] == blocks * 256 - length - 2
    assert [t for tokens in stored for t in tokens] == stream(["x" * length])


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    write_rows(tmp_path / "a.jsonl", random_texts(range(1, 200)))
    files = []
    for name in ("a", "b"):
        out = tmp_path / name / "same"
        prepare([str(tmp_path / "a.jsonl")], str(out), chunk_tokens=1024)
        described = json.loads((out / "manifest.json").read_text())["files"]
        hashes = {name: entry["sha256"] for name, entry in described.items()}
        for split in ("train", "held_out"):  # litdata's index holds the time
            del hashes[f"{split}/index.json"]
        files.append(hashes)
    assert files[0] == files[1]
    assert len(files[0]) == 20 + 2 + 1 + 2


def test_the_manifest_describes_the_data(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", {"a": "x" * 3000, "b": "", "c": "y"})
    content = prepare(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "books"), held_out=0, tolerated=0.5
    )
    read = json.loads((tmp_path / "books/manifest.json").read_text())
    assert {key: read[key] for key in content} == content
    assert read["source"] == "books"
    assert read["block"] == 256
    assert read["chunk_tokens"] == 2**22
    assert read["tokenizer"] == {
        "fingerprint": ByteTokenizer().fingerprint,
        "vocab_size": 258,
        "bos": 256,
        "eos": 257,
    }
    assert read["broken"] == {"empty text": {"count": 1, "first": "b"}}
    printed = capsys.readouterr().out
    assert "3,072 = 3,001 text + 4 BOS and EOS + 67 padding in 2 documents, 1 chunks" in printed
    assert "≥     2,048 tokens          1          3,002   99.9%" in printed
    assert f"wrote {tmp_path / 'books'}" in printed


class Numbers(Tokenizer):
    """Texts are numbers already."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.bos, self.eos = vocab_size - 1, vocab_size - 2

    def encode(self, texts):
        return [np.array([int(n) for n in text.split()]) for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def save(self, folder):
        pass

    @property
    def fingerprint(self):
        return f"numbers-{self.vocab_size}"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_tokens_are_as_wide_as_the_vocabulary_asks(tmp_path, vocab_size, dtype):
    coder = Numbers(vocab_size)
    info = TokenizerInfo(coder.fingerprint, vocab_size, coder.bos, coder.eos)
    writer = SplitWriter(tmp_path / "train", info, 512)
    document = [0, 1, 2**15, vocab_size - 3] * 150
    writer.add(np.array(document))
    writer.finish()
    expected = [coder.bos, *document, coder.eos]
    expected += [coder.bos] * (768 - len(expected))
    assert flat(tmp_path, "train", dtype) == expected
    loader = TokensLoader(block_size=256)
    theirs = StreamingDataset(str(tmp_path / "train"), item_loader=loader, shuffle=False)
    assert np.concatenate([theirs[i] for i in range(3)]).tolist() == expected


def words(folder, number):
    """A tokenizer whose BOS is a word like any other, and so can be forged."""
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, number)}}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.slow
def test_a_large_vocabulary_from_text_to_windows(tmp_path):
    coder = words(tmp_path, 70_000)
    ids = np.random.default_rng(0).integers(2, 70_000, 1000).tolist()
    write_rows(tmp_path / "a.jsonl", {"a": " ".join(f"w{i}" for i in ids)})
    prepare(
        [str(tmp_path / "a.jsonl")],
        str(tmp_path / "out"),
        coder,
        held_out=0,
        chunk_tokens=512,
        bos="<s>",
        eos="</s>",
    )
    windows = Windows(tmp_path / "out", "train", 512)
    expected = [0, *ids, 1] + [0] * 22
    assert flat(tmp_path / "out", "train", np.int32) == expected
    assert [windows[i].tolist() for i in range(len(windows))] == [expected[:513]]


def test_a_document_that_forges_bos_is_left_out_and_counted(tmp_path):
    coder = words(tmp_path, 300)
    texts = {"a": "w5 w6", "b": "w5 <s> w6", "c": "w7", "d": "</s> w8"}
    write_rows(tmp_path / "a.jsonl", texts)
    arguments = ([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), coder)
    names = {"bos": "<s>", "eos": "</s>", "held_out": 0}
    with pytest.raises(
        ValueError, match=r"1 of 4 documents are broken .* BOS in text \(1, first at b"
    ):
        prepare(*arguments, **names)
    content = prepare(*arguments, **names, tolerated=0.25)
    assert content["broken"] == {"BOS in text": {"count": 1, "first": "b"}}
    assert content["splits"]["train"]["documents"] == 3
    assert flat(tmp_path / "out", "train")[:11] == [0, 5, 6, 1, 0, 7, 1, 0, 1, 8, 1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch, error):
    write_rows(tmp_path / "a.jsonl", random_texts([3000] * 5))
    (tmp_path / "out").mkdir()
    seen = []

    def fail(writer):
        seen.extend(p.name for p in (tmp_path / "out").rglob("chunk-*.bin"))
        raise error

    monkeypatch.setattr(module.SplitWriter, "finish", fail)
    with pytest.raises(error):
        prepare(
            [str(tmp_path / "a.jsonl")], str(tmp_path / "out/data"), held_out=0, chunk_tokens=1024
        )
    assert len(seen) == 14
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_second_input_leaves_nothing(tmp_path):
    write_rows(tmp_path / "a.jsonl", random_texts([3000] * 5))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"missing\.jsonl matches no file"):
        prepare(
            [str(tmp_path / "a.jsonl"), str(tmp_path / "missing.jsonl")], str(tmp_path / "out/data")
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 1000}, "chunk_tokens 1000 is no multiple of 256"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 is no multiple of 256"),
        ({"held_out": 1}, "held_out 1 is no share; expected 0 ≤ held_out < 1"),
        ({"held_out": -0.1}, "held_out -0.1 is no share"),
        ({"tokenizer": "missing"}, "tokenizer 'missing' not found"),
        ({"held_out": 0.9999999}, "holds no document to train on"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, settings, message):
    write_rows(tmp_path / "a.jsonl", {"a": "text"})
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_existing_output_is_refused_and_kept(tmp_path):
    write_rows(tmp_path / "a.jsonl", {"a": "text"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(ValueError, match="out exists already; choose another folder or remove it"):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), held_out=0)
    assert (tmp_path / "out/mine").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def documents(folder, split):
    """Token ids of each document of a split, without BOS and EOS; padding is none."""
    tokens = [token for part in chunks(folder, split) for token in part]
    begins = [i for i, token in enumerate(tokens) if token == BOS] + [len(tokens)]
    found = [tokens[a + 1 : b - 1] for a, b in pairwise(begins) if b > a + 1]
    return found


def test_interleaving_joins_training_documents_and_leaves_held_out_ones_alone(tmp_path, capsys):
    texts = {f"{i}": chr(97 + i % 26) * 300 for i in range(60)}
    write_rows(tmp_path / "a.jsonl", texts)
    plain, joined = tmp_path / "plain", tmp_path / "joined"
    prepare(str(tmp_path / "a.jsonl"), str(plain), held_out=0.2)
    config = {"input": str(tmp_path / "a.jsonl"), "output": str(joined), "held_out": 0.2}
    config["interleave"] = {"chunk_tokens": 100, "together": 3}
    (tmp_path / "prepare.yaml").write_text(json.dumps(config))
    assert cli.main(["prepare", "--config", str(tmp_path / "prepare.yaml")]) == 0
    assert documents(joined, "held_out") == documents(plain, "held_out")
    before = documents(plain, "train")
    expected = []
    for i in range(0, len(before), 3):
        group = before[i : i + 3]
        turns = [part[at : at + 100] for at in (0, 100, 200) for part in group]
        expected.append([token for turn in turns for token in turn])
    assert documents(joined, "train") == expected
    assert manifest.read(joined)["settings"]["interleave"] == config["interleave"]


@pytest.mark.slow
def test_the_filter_keeps_what_scores_and_reports(tmp_path, capsys):
    checkpoint = tmp_path / "scorer"
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(258, 32, 64, 1, 2, bos_token_id=BOS, eos_token_id=EOS), RoPE())
    for weight in llama.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    export_pretrained(llama, checkpoint)
    texts = {f"{i}": "".join(random.Random(i).choices("abcdef", k=256)) for i in range(30)}
    write_rows(tmp_path / "a.jsonl", texts)
    settings = {"segment": 32, "window": 256, "pairs": 28, "least_strength": 0.0}
    coder = ByteTokenizer()
    scorer = DependencyScorer(DependencyFilter(str(checkpoint), 0.0, **settings))
    scores = {
        name: scorer.score(ids)
        for name, ids in zip(texts, coder.encode(list(texts.values())), strict=True)
    }
    least = sorted(scores.values())[15]
    out = tmp_path / "out"
    step = DependencyFilter(str(checkpoint), least, **settings)
    prepare(str(tmp_path / "a.jsonl"), str(out), held_out=0, filter=step)
    kept = [list(texts[name].encode()) for name in texts if scores[name] >= least]
    assert documents(out, "train") == kept
    assert len(kept) == 15
    report = manifest.read(out)["filter"]
    assert (report["kept"], report["dropped"]) == (15, 15)
    assert (report["kept_tokens"], report["dropped_tokens"]) == (15 * 256, 15 * 256)
    assert "filter kept 15 documents (3,840 tokens), dropped 15" in capsys.readouterr().out


def test_texts_that_do_not_come_back_are_counted(tmp_path, capsys):
    coder = words(tmp_path, 100)
    write_rows(tmp_path / "a.jsonl", {"a": "w5 w6", "b": "w5  w6", "c": "w7", "d": "w8 unknown"})
    settings = {"bos": "<s>", "eos": "</s>", "held_out": 0}
    found = prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), coder, **settings)
    assert found["round_trip"] == 0.5
    assert "50% of the first texts do not come back exactly" in capsys.readouterr().out


def test_the_environment_of_a_larger_job_does_not_matter(tmp_path, monkeypatch):
    """litdata would wait for ever for what another process of the job writes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("GLOBAL_RANK", "1")
    write_rows(tmp_path / "a.jsonl", {"a": "text"})
    prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), held_out=0)
    assert documents(tmp_path / "out", "train") == [list(b"text")]
