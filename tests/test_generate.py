"""Decoding: with a cache as without, as transformers does it, drawing as often as it should."""

import io
import json
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lit_longctx import cli
from lit_longctx.batch import pack
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.tokens.libraries import JsonTokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import Sampling, decode, generate, reading
from lit_longctx.generate import TextStream, generate_text, stream
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.attention import AttnImplementation
from lit_longctx.model.cache import Cache
from lit_longctx.model.layers import LayerKind, LayerPattern
from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PartialRoPE,
    PositionInterpolation,
    PositionScheme,
    ProportionalRoPE,
    QueryTemperature,
    RoPE,
    TransformerXL,
    XPos,
    YaRN,
)

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
NEW = 48
LENGTHS = 5, 1, 14, 9
FROM_40 = {"factor": 4.0, "original_context": 40}
"""With NEW tokens, LENGTHS come to 53, 49, 62 and 57: all beyond 40, some beyond 55."""
FAR = [1.5 + i for i in range(6)]
"""Divisors of long documents; 8 places are not divided: scores depend on more than distance."""
SCHEMES = [
    RoPE(100.0),
    PositionInterpolation(100.0, factor=4.0),
    NTKAware(100.0, factor=4.0),
    YaRN(100.0, **FROM_40),
    Llama3(100.0, **FROM_40),
    DynamicNTK(100.0, **FROM_40),
    LongRoPE(
        100.0,
        factor=2.0,
        short_factor=[1.0] * 6,
        long_factor=FAR,
        original_context=55,
        unscaled_tokens=8,
    ),
    PartialRoPE(100.0, partial_rotary_factor=0.5),
    ProportionalRoPE(100.0, partial_rotary_factor=0.5),
    XPos(100.0, scale_base=8.0, centre=30),
    TransformerXL(100.0, distance_dim=8),
    LayerPattern(
        ["hotter"],
        {"hotter": LayerKind(RoPE(100.0), 20, query_temperature=QueryTemperature(8, 0.5))},
    ),
]
every_scheme = pytest.mark.parametrize("position", SCHEMES, ids=lambda p: type(p).__name__)
kinds_of_schemes = pytest.mark.parametrize(
    "position",
    [
        scheme
        if isinstance(scheme, DynamicNTK | TransformerXL)
        else pytest.param(scheme, marks=pytest.mark.slow)
        for scheme in SCHEMES
    ],
    ids=lambda p: type(p).__name__,
)
"""One whose keys depend on the length and one that is not rotary; the others are slow tests."""


def model(
    position: PositionScheme | LayerPattern | None = None,
    config: LlamaConfig = CONFIG,
    attn_implementation: AttnImplementation = "sdpa",
) -> Llama:
    """Return a model whose weights are large enough that the likeliest token stands out."""
    llama = Llama(config, position or RoPE(theta=100.0), attn_implementation)
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return llama.eval()


def prompts(rows: int = 3, seq: int = 5) -> Tensor:
    return torch.randint(3, CONFIG.vocab_size, (rows, seq))


def ragged() -> list[Tensor]:
    return [torch.randint(3, CONFIG.vocab_size, (n,)) for n in LENGTHS]


@torch.no_grad()
def assert_greedy(llama: Llama, ids: Tensor, read: int) -> None:
    """Every token from place `read` on is the argmax of reading all at once, with no cache.

    By induction from the first, this is what reading everything again for each token would give,
    in a document that is from the start as long as it will be in the end.
    """
    assert torch.equal(ids[:, read:], llama.logits(reading(ids))[:, read - 1 : -1].argmax(-1))


def decoded(llama: Llama, given: Sequence[Tensor], new: int, **options) -> list[Tensor]:
    found = torch.stack(list(decode(llama, given, new, **options)), dim=1)
    return [torch.cat(rows) for rows in zip(given, found, strict=True)]


@pytest.mark.fast_cases(3)
@every_scheme
def test_cached_greedy_is_the_argmax_of_reading_everything_again(position: PositionScheme):
    llama, prompt = model(position), prompts()
    found = generate(llama, prompt, NEW)
    assert found.shape == (3, 5 + NEW)
    assert torch.equal(found[:, :5], prompt)
    assert_greedy(llama, found, read=5)
    assert all(len(row[5:].unique()) > 5 for row in found)  # no repetition that anything could do


@kinds_of_schemes
def test_prompts_of_different_lengths_go_on_as_each_would_alone(position: PositionScheme):
    llama, given = model(position), ragged()
    for prompt, found in zip(given, decoded(llama, given, NEW), strict=True):
        assert len(found) == len(prompt) + NEW
        assert_greedy(llama, found[None], len(prompt))


@pytest.mark.slow
@pytest.mark.parametrize("position", [RoPE(100.0), TransformerXL()], ids=repr)
def test_flex_attention_serves_prompts_of_different_lengths_in_chunks(position: PositionScheme):
    llama, given = model(position, attn_implementation="flex_attention"), ragged()
    plain = model(position)
    plain.load_state_dict(llama.state_dict())
    found = decoded(llama, given, 8, prefill_tokens=12)
    for prompt, row in zip(given, found, strict=True):
        assert_greedy(plain, row[None], len(prompt))


@kinds_of_schemes
@pytest.mark.parametrize("prefill_tokens", [pytest.param(1, marks=pytest.mark.slow), 12, 30])
def test_reading_the_prompt_in_chunks_changes_nothing(
    position: PositionScheme, prefill_tokens: int
):
    llama, given = model(position), ragged()
    whole = decoded(llama, given, 12)
    chunked = decoded(llama, given, 12, prefill_tokens=prefill_tokens)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_chunks_bound_the_tokens_that_a_layer_sees_at_once():
    llama = model()
    seen = []
    llama.model.layers.get_submodule("1.mlp").register_forward_pre_hook(
        lambda _, x: seen.append(x[0].shape[:2])
    )
    generate(llama, prompts(rows=2, seq=50), 3, prefill_tokens=24)
    assert seen == [(2, 12)] * 4 + [(2, 2)] + [(2, 1)] * 2


def test_the_head_reads_the_last_place_only():
    llama, batch = model(), reading(prompts())
    with torch.no_grad():
        whole = llama.logits(batch)
        torch.testing.assert_close(llama.logits(batch, last=2), whole[:, -2:])
    assert llama.logits(batch, Cache(2), last=1).shape == (3, 1, CONFIG.vocab_size)


def test_the_cache_holds_place_features_for_one_head_only():
    """Allocated once for what is planned: content of every head, the place for one, values."""
    cache = Cache(2, planned=20)
    with torch.no_grad():
        model(TransformerXL(distance_dim=8)).logits(reading(prompts()), cache)
    shapes = [(3, 20, 2, 12), (3, 20, 1, 8), (3, 20, 2, 12)]
    assert [tuple(held.shape) for held in cache.layers[0].stored] == shapes


def test_a_cache_without_a_plan_grows():
    llama, ids = model().double(), prompts(seq=40)
    cache = Cache(2)
    with torch.no_grad():
        parts = [
            llama.logits(reading(ids[:, i:j], i), cache) for i, j in pairwise((0, 7, 8, 9, 40))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), llama.logits(reading(ids)))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("position", SCHEMES[:5], ids=lambda p: type(p).__name__)
def test_greedy_is_that_of_transformers_on_the_exported_folder(
    position: PositionScheme, tmp_path: Path
):
    transformers = pytest.importorskip("transformers")
    llama, given = model(position), ragged()
    export_pretrained(llama, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    # with these numbers as its ids, no row meets the end
    theirs.generation_config.eos_token_id = None
    longest = max(LENGTHS)
    padded = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in given])
    expected = theirs.generate(
        padded,
        attention_mask=(padded > 0).long(),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    for prompt, found, row in zip(given, decoded(llama, given, NEW), expected, strict=True):
        assert torch.equal(found, row[longest - len(prompt) :])


def test_a_row_stops_at_eos_and_the_others_go_on():
    llama, prompt = model(), prompts(rows=4)
    free = generate(llama, prompt, NEW)
    eos = int(free[0, 5 + 3])  # what row 0 says fourth ends it, and whoever else says it
    found = generate(llama, prompt, NEW, eos=eos)
    ends = []
    for row, unbounded in zip(found, free, strict=True):
        met = (unbounded[5:] == eos).nonzero().flatten()
        end = 5 + int(met[0]) + 1 if len(met) else 5 + NEW
        ends.append(end)
        assert torch.equal(row[:end], unbounded[: min(end, found.shape[1])])
        assert (row[end:] == eos).all()
    assert ends[0] <= 5 + 4
    assert len(set(ends)) > 1
    assert found.shape[1] == max(ends)


def test_generation_stops_when_every_row_has_ended():
    llama, prompt = model(), prompts(rows=1)
    free = generate(llama, prompt, NEW)
    eos = int(free[0, 5 + 3])
    first = int((free[0, 5:] == eos).nonzero()[0])
    assert torch.equal(generate(llama, prompt, NEW, eos=eos), free[:, : 5 + first + 1])


def test_seeds_reproduce_and_differ():
    llama, prompt = model(), prompts()
    one, same, other = (generate(llama, prompt, NEW, 1.0, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sampling_is_independent_of_torchs_global_state():
    llama, prompt = model(), prompts()
    one = generate(llama, prompt, NEW, 1.0, seed=7)
    torch.manual_seed(123)
    assert torch.equal(one, generate(llama, prompt, NEW, 1.0, seed=7))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_their_logits(temperature: float):
    llama, prompt = model(), prompts(rows=1)
    draws = 20_000
    drawn = generate(llama, prompt.expand(draws, -1), 1, temperature)[:, -1]
    with torch.no_grad():
        logits = llama.logits(reading(prompt))[0, -1].double()
    probs = (logits / temperature).exp()
    probs = probs / probs.sum()
    found = drawn.bincount(minlength=CONFIG.vocab_size) / draws
    deviation = (probs * (1 - probs) / draws).sqrt()
    assert ((found - probs).abs() <= 5 * deviation + 1 / draws).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (None, 0.6), (20, 0.8), (99, 0.01)])
def test_probabilities_are_those_of_transformers_warpers(top_k: int | None, top_p: float):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(50, CONFIG.vocab_size)
    warpers = [process.TemperatureLogitsWarper(0.7)]
    warpers += [process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(torch.zeros(50, 1, dtype=torch.long), expected)
    found = Sampling(0.7, top_k, top_p).probs(logits)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=0)
    assert (found == 0).any()


def test_top_k_1_is_greedy():
    llama, prompt = model(), prompts()
    assert torch.equal(generate(llama, prompt, NEW, 2.0, top_k=1), generate(llama, prompt, NEW))


# ---- text

TEXT = "naïve 日本語 🎉🎉 wörld\nend of 🎉 text"


def joined(pieces: TextStream, ids: Sequence[int]) -> str:
    return "".join([pieces.add(i) for i in ids]) + pieces.close()


def bpe(folder: Path) -> JsonTokenizer:
    """Return a tokenizer whose tokens are words with the space in front, else single bytes."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    own = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    trained.decoder = decoders.Sequence([*own, decoders.Strip(" ", 1, 0)])  # pyright: ignore
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["the end of a text", "a world of words", "of the world"] * 9
    trained.train_from_iterator(words, trainers.BpeTrainer(special_tokens=special, vocab_size=400))
    file = folder / "tokenizer.json"
    described = json.loads(trained.to_str())
    for token in described["added_tokens"][3:]:
        token["special"] = False  # bytes are text
    file.write_text(json.dumps(described))
    return JsonTokenizer(file, "<s>", "</s>")


def test_pieces_are_the_text_and_never_split_a_character():
    pieces = TextStream(ByteTokenizer())
    found = [pieces.add(byte) for byte in TEXT.encode()]
    assert [piece for piece in found if piece] == list(TEXT)
    assert pieces.close() == ""


def test_pieces_of_any_bytes_are_their_text():
    rng = random.Random(0)
    letters = [*TEXT.encode(), *"é日🎉".encode(), 0xFF, 0xE2, 0x80]
    for _ in range(300):
        ids = bytes(rng.choices(letters, k=30))
        assert joined(TextStream(ByteTokenizer(), b"prompt"), ids) == ids.decode(errors="replace")


def test_pieces_keep_the_spaces_that_a_tokenizer_hides_at_the_beginning(tmp_path: Path):
    coder = bpe(tmp_path)
    prompt, text = "the end", " of a world 日本 of words"
    ids = coder.encode([prompt + text])[0].tolist()
    read = len(coder.encode([prompt])[0])
    assert coder.decode(ids[read:])[0] != " "  # or this test shows nothing
    pieces = TextStream(coder, [coder.bos, *ids[:read]])
    found = [pieces.add(i) for i in ids[read:]]
    assert "".join(found) + pieces.close() == text
    assert {" of", "日", "本"} <= set(found)


class Chunks(ByteTokenizer):
    """A tokenizer whose ids stand for pieces of one text."""

    def __init__(self, text: str, sizes: Sequence[int]) -> None:
        ends = list(accumulate(sizes, initial=0))
        self.chunks = [text[a:b] for a, b in pairwise(ends)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chunks[i] for i in ids)


def up_to(stop: Sequence[str], text: str) -> str:
    """Text before the stop string that is complete first, found by reading letter by letter."""
    for end in range(len(text) + 1):
        complete = [text[: end - len(s)] for s in stop if text[:end].endswith(s)]
        if complete:
            return min(complete, key=len)
    return text


@pytest.mark.parametrize(
    "stop", [["end"], ["🎉 "], ["wörldly", "ld\n"], ["\n", "日本語 🎉🎉"], ["x"]]
)
def test_text_ends_before_the_first_stop_string(stop: list[str]):
    assert joined(TextStream(ByteTokenizer(), stop=stop), TEXT.encode()) == up_to(stop, TEXT)


def test_stop_strings_end_random_text_however_it_is_cut_into_tokens():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abc", k=60))
        stop = ["".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        tokens = Chunks(text, rng.choices(range(1, 7), k=60))
        pieces = TextStream(tokens, stop=stop)
        assert joined(pieces, range(60)) == up_to(stop, text)


def test_text_is_held_only_as_long_as_it_may_become_a_stop_string():
    pieces = TextStream(ByteTokenizer(), stop=["###"])
    found = [pieces.add(byte) for byte in b"a#b##c###d"]
    assert found == ["a", "", "#b", "", "", "##c", "", "", "", ""]


def text_model() -> Llama:
    """A byte model; all but the vocabulary as small as can be."""
    return model(config=LlamaConfig(258, 32, 32, num_hidden_layers=1, num_attention_heads=2))


def text_of(llama: Llama, prompt: str, new: int) -> str:
    """What follows a prompt, until EOS."""
    ids = [256, *prompt.encode()]
    found = generate(llama, torch.tensor([ids]), new)[0, len(ids) :].tolist()
    found = found[: found.index(257)] if 257 in found else found
    return bytes(i for i in found if i < 256).decode(errors="replace")


def test_a_batch_of_texts_streams_as_each_would_alone():
    llama, given = text_model(), ["once", "a", "in a hole 日本"]
    found = zip(*stream(llama, ByteTokenizer(), given, 24), strict=True)
    assert ["".join(row) for row in found] == [text_of(llama, prompt, 24) for prompt in given]


def test_a_batch_goes_on_until_every_row_met_its_stop_string():
    llama, given = text_model(), ["once", "in a hole"]
    whole = [text_of(llama, prompt, 24) for prompt in given]
    stop = [whole[0][3:5], whole[1][8:11]]
    found = list(stream(llama, ByteTokenizer(), given, 24, stop=stop))
    expected = [up_to(stop, text) for text in whole]
    assert ["".join(row) for row in zip(*found, strict=True)] == expected
    assert len(found) < 24


def test_text_goes_on_from_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    llama = text_model()
    folder = export_pretrained(llama, tmp_path / "hf", tokenizer=ByteTokenizer())
    text = generate_text(str(folder), "once", max_new_tokens=8)
    assert capsys.readouterr().out == text + "\n"
    assert text == "once" + text_of(llama, "once", 8)
    stopped = generate_text(str(folder), "once", 8, stop=text[6:8])
    assert stopped == "once" + up_to([text[6:8]], text[4:])


def test_the_verb_reads_standard_input_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    llama = text_model()
    folder = str(export_pretrained(llama, tmp_path / "hf", tokenizer=ByteTokenizer()))
    whole = text_of(llama, "once", 24)
    stop = whole[5:8]
    monkeypatch.setattr("sys.stdin", io.StringIO("once"))
    given = ["--checkpoint", folder, "--prompt", "-", "--max_new_tokens", "24"]
    assert cli.main(["generate", *given, "--stop", json.dumps([stop])]) == 0
    assert capsys.readouterr().out == f"once{whole.split(stop)[0]}\n"


# ---- errors


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path: Path):
    folder = export_pretrained(model(), tmp_path / "hf")
    with pytest.raises(ValueError, match="has no tokenizer; pass --tokenizer"):
        generate_text(str(folder), "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5, "temperature": 1.0}, r"top_p must be in \(0, 1\]; got 1.5"),
        ({"top_k": 0, "temperature": 1.0}, "top_k must be 1 or more; got 0"),
        ({"top_k": 5}, "expect a temperature above 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more; got -1.0"),
        ({"prefill_tokens": 0}, "prefill_tokens must be 1 or more; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts(), **{"max_new_tokens": 2, **options})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="got an empty one; begin with BOS"):
        generate(model(), prompts(seq=0), 1)
    with pytest.raises(ValueError, match="expected a prompt; got an empty one"):
        next(stream(text_model(), ByteTokenizer(), ["a", ""], 1))
    with pytest.raises(ValueError, match="stop strings with characters"):
        next(stream(text_model(), ByteTokenizer(), ["a"], 1, stop=[""]))


def test_a_scheme_refuses_before_the_prompt_is_read_what_it_cannot_reach():
    llama = model(XPos(100.0, scale_base=1.0, centre=0))
    llama.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the prompt was read"))
    with pytest.raises(ValueError, match="xPos scales leave float32 at position 104"):
        generate(llama, prompts(), 100)


def test_a_cache_refuses_packed_rows_when_padded_too():
    packed = pack(torch.tensor([[1, 5, 6, 1, 7, 8]]), bos=1)
    with pytest.raises(ValueError, match="one document per row"):
        model().logits(packed, Cache(2, padding=[1]))
