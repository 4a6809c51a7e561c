import io
import json
import pickle
import random
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from lit_longctx.data.tokens.libraries import JsonTokenizer, SentencePieceTokenizer
from lit_longctx.data.tokens.opening import fingerprint_of, open_tokenizer, round_trip
from lit_longctx.data.tokens.tokenizer import ByteTokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def random_texts(number, seed=0):
    """Text over all of Unicode, half of it ASCII, all lengths from none to hundreds."""
    generator = random.Random(seed)
    drawn = []
    for _ in range(number):
        letters = []
        for _ in range(int(generator.expovariate(1 / 40))):
            point = generator.choice([generator.randrange(128), generator.randrange(0x110000)])
            letters.append(chr(point) if not 0xD800 <= point < 0xE000 else "\n")
        drawn.append("".join(letters))
    return [*drawn, "Do n't , it 's ! ", "", "\0", "\u2028 \ufeff", "e\u0301 é", "👩‍👩‍👧"]


def bpe(extra_specials=(), vocab_size=600):
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *extra_specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog <s> and </s> " * 3, "a b c <s><s> s>"]
    model.train_from_iterator(corpus * 20, trainer)
    pair = [("<s>", model.token_to_id("<s>")), ("</s>", model.token_to_id("</s>"))]
    model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    return model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "bpe"
    path.mkdir()
    bpe().save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "kept": 1}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_bytes_are_the_utf8_of_the_text_and_come_back():
    coder = ByteTokenizer()
    texts = random_texts(500)
    ids = coder.encode(texts)
    assert [i.tolist() for i in ids] == [list(text.encode()) for text in texts]
    assert [coder.decode(i.tolist()) for i in ids] == texts
    assert [coder.decode([256, *i.tolist(), 257]) for i in ids] == texts
    assert {i.dtype for i in ids} == {np.dtype(np.uint16)}


def test_cut_characters_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([*"aé".encode()[:-1], 257]) == "a\ufffd"


def test_saved_bytes_are_the_same_ids_for_tokenizers(tmp_path):
    coder = ByteTokenizer()
    coder.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size(with_added_tokens=True) == coder.vocab_size == 258
    assert (theirs.token_to_id("<bos>"), theirs.token_to_id("<eos>")) == (256, 257)
    theirs.encode_special_tokens = True
    texts = [*random_texts(300), "<bos>", "a<eos>b <bos>"]
    for text, ids in zip(texts, coder.encode(texts), strict=True):
        found = theirs.encode(text, add_special_tokens=False).ids
        assert found == ids.tolist()
        assert theirs.decode(found) == text


def test_saved_bytes_are_the_same_ids_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    coder = ByteTokenizer()
    coder.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (256, 257, 258)
    texts = random_texts(300)
    for text, ids in zip(texts, coder.encode(texts), strict=True):
        found = theirs(text)["input_ids"]
        assert found == [256, *ids.tolist()]
        assert theirs.decode([*found, 257], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<s>", "a <s> b", "<s><s>", "</s><s>", " <s>\n", "<", "s>", "<s"])
def test_text_cannot_forge_bos_or_eos(folder, text):
    coder = open_tokenizer(str(folder))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = coder.encode([text])[0].tolist()
    if "<s>" in text:
        assert coder.bos in plain.encode(text, add_special_tokens=False).ids
    assert not {coder.bos, coder.eos} & set(ids)
    assert "".join(coder.decode([i]) for i in ids) == text
    assert coder.decode([coder.bos, *ids, coder.eos]) == text


def test_json_tokenizer_is_the_library_on_text_without_specials(folder):
    coder = open_tokenizer(str(folder))
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = random_texts(300)
    expected = [plain.encode(text, add_special_tokens=False).ids for text in texts]
    ids = coder.encode(texts)
    assert [i.tolist() for i in ids] == expected
    assert [coder.decode(i.tolist()) for i in ids] == texts
    names = (plain.token_to_id("<s>"), plain.token_to_id("</s>"))
    assert (coder.bos, coder.eos) == names == (1, 2)
    assert coder.vocab_size == plain.get_vocab_size(with_added_tokens=True)


def test_padding_and_truncation_in_the_file_are_ignored(folder):
    model = bpe()
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog" * 20
    ids = open_tokenizer(str(folder)).encode([text, "a"])
    assert [i.tolist() for i in ids] == [
        bpe().encode(t, add_special_tokens=False).ids for t in (text, "a")
    ]


@pytest.mark.slow
def test_a_large_vocabulary_has_wide_ids(folder):
    model = bpe()
    model.add_special_tokens([AddedToken(f"<{i}>", special=True) for i in range(2**16)])
    model.save(str(folder / "tokenizer.json"))
    coder = open_tokenizer(str(folder))
    assert coder.vocab_size == model.get_vocab_size() > 2**16
    assert coder.encode(["the"])[0].dtype == np.int32


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (None, {}, r"bpe names no BOS token; pass --bos TOKEN$"),
        ({}, {}, r"bpe names no BOS token; pass --bos TOKEN$"),
        (
            {"bos_token": None, "eos_token": "</s>"},
            {},
            r"bpe names no BOS token; pass --bos TOKEN$",
        ),
        ({"bos_token": "<s>"}, {}, r"bpe names no EOS token; pass --eos TOKEN$"),
        (None, {"bos": "<s>"}, r"bpe names no EOS token; pass --eos TOKEN$"),
        ({"bos_token": "[BOS]"}, {}, r"tokenizer\.json has no token '\[BOS\]' for BOS$"),
        (None, {"bos": "[BOS]"}, r"tokenizer\.json has no token '\[BOS\]' for BOS$"),
        (["<s>"], {}, r"tokenizer_config\.json holds no JSON object$"),
        ("{", {}, r"tokenizer_config\.json is no JSON: "),
    ],
)
def test_bos_and_eos_are_named_or_asked_for(folder, config, given, message):
    path = folder / "tokenizer_config.json"
    path.unlink()
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as found:
        open_tokenizer(str(folder), **given)
    assert "\n" not in str(found.value)


def test_given_bos_wins_over_the_config(folder):
    coder = open_tokenizer(str(folder), bos="<pad>")
    assert (coder.bos, coder.eos) == (3, 2)


@pytest.mark.parametrize(
    "given", [{}, {"bos": "<pad>"}, {"bos": "<s>", "eos": "</s>"}, {"bos": "</s>", "eos": "</s>"}]
)
@pytest.mark.parametrize("config", [True, False])
def test_a_saved_tokenizer_is_the_same_tokenizer(folder, tmp_path, given, config):
    if not config:
        (folder / "tokenizer_config.json").unlink()
        given = {"bos": "<s>", "eos": "</s>", **given}
    coder = open_tokenizer(str(folder), **given)
    coder.save(tmp_path)
    again = open_tokenizer(str(tmp_path))
    assert (again.bos, again.eos) == (coder.bos, coder.eos)
    assert again.fingerprint == coder.fingerprint
    text = "the quick <s> fox"
    assert again.encode([text])[0].tolist() == coder.encode([text])[0].tolist()
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written.get("kept") == (1 if config else None)
    if config and not given:
        assert written["eos_token"] == {"content": "</s>", "lstrip": False}


def test_a_saved_tokenizer_opens_in_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").unlink()
    coder = open_tokenizer(str(folder / "tokenizer.json"), bos="<s>", eos="</s>")
    coder.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (coder.bos, coder.eos)
    texts = ["the quick brown fox", "lazy\n\ndog é"]
    found = theirs(texts, add_special_tokens=False)["input_ids"]
    assert found == [ids.tolist() for ids in coder.encode(texts)]


def test_fingerprints_tell_tokenizers_apart(folder, tmp_path):
    same = open_tokenizer(str(folder)).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_tokenizer(str(tmp_path / "copy")).fingerprint == same
    other = open_tokenizer(str(folder), bos="<pad>").fingerprint
    bpe(vocab_size=270).save(str(folder / "tokenizer.json"))
    smaller = open_tokenizer(str(folder)).fingerprint
    assert len({same, other, smaller, ByteTokenizer().fingerprint}) == 4


def test_what_bytes_is_opened_from(tmp_path, folder):
    ByteTokenizer().save(tmp_path)
    assert isinstance(open_tokenizer("bytes"), ByteTokenizer)
    assert isinstance(open_tokenizer(str(tmp_path)), ByteTokenizer)
    assert isinstance(open_tokenizer(str(tmp_path / "tokenizer.json")), ByteTokenizer)
    assert isinstance(open_tokenizer(str(folder)), JsonTokenizer)
    assert isinstance(open_tokenizer(str(folder / "tokenizer.json")), JsonTokenizer)


def test_256_letters_in_another_order_are_not_bytes(tmp_path):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    written = json.loads(path.read_text())
    written["model"]["vocab"] = {k: 255 - v for k, v in written["model"]["vocab"].items()}
    path.write_text(json.dumps(written))
    assert open_tokenizer(str(tmp_path)).encode(["abc"])[0].tolist() == [158, 157, 156]


def test_bytes_with_another_bos_are_refused():
    with pytest.raises(ValueError, match="leave --bos and --eos out"):
        open_tokenizer("bytes", bos="<s>")


@pytest.mark.parametrize("name", ["missing", "folder", "byte"])
def test_a_missing_tokenizer_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match=r"not found; expected 'bytes', a tokenizer\.json, a tokenizer\.model or "
    ):
        open_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {}}', '{"model": 3}'])
def test_a_broken_tokenizer_json_is_named(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json: "):
        open_tokenizer(str(folder))


def change(folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def without_effect(found):
    """Changes of a tokenizer.json that change no id of a text."""
    padding = bpe()
    padding.enable_padding(length=7)
    padding.enable_truncation(5)
    yield json.loads(padding.to_str())
    yield {"decoder": None, "post_processor": None}
    yield {"model": {**found["model"], "merges": [" ".join(m) for m in found["model"]["merges"]]}}
    yield {"model": {k: v for k, v in found["model"].items() if v not in (None, False)}}
    more = bpe()
    more.add_special_tokens(["<|pad|>"])
    yield {"added_tokens": json.loads(more.to_str())["added_tokens"]}


def with_effect(found):
    """Changes that change the ids of the text in the test below."""
    more = bpe()
    more.add_tokens(["quick brown"])
    yield {"added_tokens": json.loads(more.to_str())["added_tokens"]}
    yield {"normalizer": {"type": "Lowercase"}}
    yield {"model": {**found["model"], "merges": found["model"]["merges"][:20]}}
    yield {"model": {**found["model"], "ignore_merges": True}, "pre_tokenizer": None}


@pytest.mark.parametrize("changes", [without_effect, with_effect])
def test_a_fingerprint_is_of_what_decides_ids(folder, changes):
    found = json.loads((folder / "tokenizer.json").read_text())
    coder = open_tokenizer(str(folder))
    text = "The quick brown fox <s> jumps."
    before = (coder.encode([text])[0].tolist(), coder.fingerprint)
    seen = 0
    for parts in changes(found):
        (folder / "tokenizer.json").write_text(json.dumps(found, indent=3, sort_keys=True))
        change(folder, **parts)
        coder = open_tokenizer(str(folder))
        after = (coder.encode([text])[0].tolist(), coder.fingerprint)
        same = [a == b for a, b in zip(before, after, strict=True)]
        assert same == ([True] * 2 if changes is without_effect else [False] * 2), parts.keys()
        seen += 1
    assert seen >= 4


def test_saving_with_transformers_keeps_the_fingerprint(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    before = fingerprint_of(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "plain")
    assert fingerprint_of(tmp_path / "plain") == before
    theirs.pad_token = "<|pad|>"
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(tmp_path / "chat")
    assert fingerprint_of(tmp_path / "chat") == before
    theirs.add_tokens(["quick"])
    theirs.save_pretrained(tmp_path / "more")
    assert fingerprint_of(tmp_path / "more") != before


def test_the_fingerprint_of_a_folder(folder, tmp_path):
    assert fingerprint_of(tmp_path / "missing") is None
    assert fingerprint_of(tmp_path) is None
    coder = open_tokenizer(str(folder))
    assert fingerprint_of(folder) == coder.fingerprint == fingerprint_of(folder, coder.bos, 2)
    assert fingerprint_of(folder, 3, 2) == open_tokenizer(str(folder), bos="<pad>").fingerprint
    (folder / "tokenizer_config.json").unlink()
    assert fingerprint_of(str(folder), 1, 2) == coder.fingerprint
    with pytest.raises(ValueError, match="names no BOS token"):
        fingerprint_of(folder)
    ByteTokenizer().save(tmp_path)
    assert fingerprint_of(tmp_path) == fingerprint_of(tmp_path, 256, 257) == "bytes-258"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', '{"model": {}, "x": 1}'])
def test_the_fingerprint_of_a_broken_tokenizer_is_one_line(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json: ") as found:
        fingerprint_of(folder)
    assert "\n" not in str(found.value)


def test_the_round_trip_counts_texts_that_come_back(folder):
    texts = random_texts(50)
    assert round_trip(ByteTokenizer(), texts) == 1
    assert round_trip(open_tokenizer(str(folder)), [*texts, "a <s> b"]) == 1
    assert round_trip(ByteTokenizer(), []) == 1
    change(folder, normalizer={"type": "Lowercase"})
    assert round_trip(open_tokenizer(str(folder)), ["a", "B", "c d", "\n"]) == 0.75


PIECES = ["the quick brown fox jumps", "a b  c <s> and </s>", "déjà vu\tnaïve", "def f(x):"]


def pieces(kind="bpe", **settings):
    """Bytes of a tokenizer.model trained by sentencepiece itself, lossless unless told."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PIECES * 20),
        model_writer=out,
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
        **{**lossless, **settings},
    )
    return out.getvalue()


@pytest.fixture(params=["bpe", "unigram"])
def piece_folder(request, tmp_path):
    path = tmp_path / "pieces"
    path.mkdir()
    (path / "tokenizer.model").write_bytes(pieces(request.param))
    return path


def test_sentencepiece_is_the_library(piece_folder):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(piece_folder / "tokenizer.model"))
    coder = open_tokenizer(str(piece_folder))
    assert isinstance(coder, SentencePieceTokenizer)
    assert isinstance(open_tokenizer(str(piece_folder / "tokenizer.model")), SentencePieceTokenizer)
    assert (coder.bos, coder.eos) == (theirs.bos_id(), theirs.eos_id()) == (1, 2)
    assert coder.vocab_size == theirs.get_piece_size()
    texts = [text for text in random_texts(200) if "\0" not in text]
    ids = coder.encode(texts)
    assert [i.tolist() for i in ids] == [theirs.encode(text) for text in texts]
    assert {i.dtype for i in ids} == {np.dtype(np.uint16)}
    assert round_trip(coder, texts) == 1
    assert coder.decode([1, *ids[0].tolist(), 2]) == texts[0]


@pytest.mark.parametrize("text", ["<s>", "a <s> b", "<s><s>", "</s>\n<s>", "<unk>", "<pad>"])
def test_no_text_forges_control_symbols_of_sentencepiece(piece_folder, text):
    coder = open_tokenizer(str(piece_folder))
    ids = coder.encode([text])[0].tolist()
    assert not {coder.bos, coder.eos} & set(ids)
    assert coder.decode(ids) == text


def test_user_defined_symbols_are_single_tokens(piece_folder):
    coder = open_tokenizer(str(piece_folder), bos="<|user|>")
    assert coder.bos in coder.encode(["a <|user|> b"])[0]


def test_what_a_normalizing_model_changes_shows_in_the_round_trip(tmp_path):
    lossy = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    (tmp_path / "tokenizer.model").write_bytes(pieces(**lossy))
    coder = open_tokenizer(str(tmp_path))
    assert round_trip(coder, ["fine", "two  spaces", "ﬁ ligature", "also fine"]) == 0.5


def test_a_saved_sentencepiece_model_is_the_same_tokenizer(piece_folder, tmp_path):
    coder = open_tokenizer(str(piece_folder), bos="<|user|>")
    coder.save(tmp_path)
    again = open_tokenizer(str(tmp_path))
    assert isinstance(again, SentencePieceTokenizer)
    assert (again.bos, again.eos) == (coder.bos, coder.eos) == (3, 2)
    assert again.fingerprint == coder.fingerprint == fingerprint_of(tmp_path)
    assert fingerprint_of(piece_folder) != coder.fingerprint
    assert fingerprint_of(piece_folder, 3, 2) == coder.fingerprint


def test_a_saved_sentencepiece_model_opens_in_transformers(piece_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    coder = open_tokenizer(str(piece_folder))
    coder.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, coder.vocab_size)
    texts = ["the quick brown fox", "déjà  vu", "a\n\tb 中 <|user|> c"]
    found = theirs(texts, add_special_tokens=False)["input_ids"]
    assert found == [ids.tolist() for ids in coder.encode(texts)]


def test_tokenizer_json_comes_before_tokenizer_model(folder):
    (folder / "tokenizer.model").write_bytes(pieces())
    assert isinstance(open_tokenizer(str(folder)), JsonTokenizer)


def test_bos_of_sentencepiece_is_named_or_asked_for(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces(bos_id=-1))
    with pytest.raises(ValueError, match=r"names no BOS token; pass --bos TOKEN$"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer\.model has no token '\[BOS\]' for BOS$"):
        open_tokenizer(str(tmp_path), bos="[BOS]")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "</s>"}}')
    coder = open_tokenizer(str(tmp_path))
    assert coder.bos == coder.eos != -1


def test_a_broken_or_unsupported_sentencepiece_model_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"junk" * 50, pieces()[:1000]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"tokenizer\.model is no sentencepiece model"
        ) as found:
            open_tokenizer(str(path))
        assert "\n" not in str(found.value)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"needs the package sentencepiece; pip install"):
        open_tokenizer(str(path))


def test_a_copy_for_another_process_still_reads_special_tokens_as_text(folder):
    coder = open_tokenizer(str(folder))
    copied = pickle.loads(pickle.dumps(coder))
    texts = ["<s> and </s>", "plain"]
    for ours, theirs in zip(copied.encode(texts), coder.encode(texts), strict=True):
        assert ours.tolist() == theirs.tolist()
        assert copied.bos not in ours.tolist()
    assert (copied.bos, copied.eos) == (coder.bos, coder.eos)
