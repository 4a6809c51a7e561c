"""Prompts read back by the tokenizers' libraries and string search; scores by torchmetrics."""

import io
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.evaluation.retrieval.prompts import Haystack, Hidden, hide, neutral_text, piece
from lit_longctx.evaluation.retrieval.registry import TASKS, task_named
from lit_longctx.evaluation.retrieval.ruler import CommonWords, MultiKey
from lit_longctx.evaluation.retrieval.scoring import generated, teacher_forced
from lit_longctx.evaluation.retrieval.tasks import FU_DEPTHS, FU_LENGTHS, SECRET, Needle, rouge_l
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import DynamicNTK, RoPE

KINDS = ["bytes", "digits_bpe", "byte_bpe", "metaspace", "pieces", "normalizing"]
TWO = pytest.mark.parametrize("hay", KINDS[:2], indirect=True)
"""A token per byte, and tokens of several letters that join across what a task puts together."""
OTHERS = pytest.mark.parametrize("hay", KINDS[2:], indirect=True)
PROMPTS = (
    "There is an important info hidden inside a lot of irrelevant text. The grass is green.\n"
    "What are all the special magic numbers? They are: Remember the pass key is hidden.\n"
    "One of the special magic numbers for variables hold the value below. The sky is blue.\n\n"
)
LENGTHS = [256, 1024, 4096, 32_768]
DEPTHS = [0, 37.5, 50, 100]


def byte_level(split):
    """BPE over bytes as GPT-2's, or with Llama 3's way to split numbers and line ends."""
    model = tokenizers.Tokenizer(models.BPE())
    if split:
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        first = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([first, rest])
    else:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(model, initial_alphabet=sorted(alphabet))


def metaspace():
    """Llama 2's tokenizer.json: a space put before every text, no splits, bytes as a fallback."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = [chr(i) for i in range(32, 127)]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    found = json.loads(train(model, fallback, initial_alphabet=alphabet).to_str())
    found["added_tokens"] = found["added_tokens"][:3]  # bytes are tokens like others
    return tokenizers.Tokenizer.from_str(json.dumps(found))


def train(model, more=(), **settings):
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "</s>", *more],
        show_progress=False,
        **settings,
    )
    # word by word, as a model without splits would learn whole sentences
    words = re.findall(r"\s?\S+|\s", (neutral_text(300) + PROMPTS) * 3)
    model.train_from_iterator(words, trainer)
    return model


def sentence_pieces(**settings):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((neutral_text(300) + PROMPTS * 5).splitlines()),
        model_writer=out,
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def hay(request, tmp_path_factory):
    """The built-in hay for each tokenizer."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    if kind == "bytes":
        return Haystack(ByteTokenizer())
    if kind in ("pieces", "normalizing"):
        lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        settings = {"model_type": "bpe", **lossless} if kind == "pieces" else {}
        (folder / "tokenizer.model").write_bytes(sentence_pieces(**settings))
        return Haystack(open_tokenizer(str(folder)))
    model = metaspace() if kind == "metaspace" else byte_level(kind == "digits_bpe")
    model.save(str(folder / "tokenizer.json"))
    return Haystack(open_tokenizer(str(folder / "tokenizer.json"), "<s>", "</s>"))


@pytest.fixture(scope="module")
def read(hay):
    """Ids → text by the tokenizer's own library, with white space as single spaces."""
    coder = hay.tokenizer
    if isinstance(coder, ByteTokenizer):
        decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")  # noqa: E731
    elif coder.file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        decode = SentencePieceProcessor(model_file=str(coder.file)).decode
    else:
        decode = tokenizers.Tokenizer.from_file(str(coder.file)).decode
    return lambda ids: " ".join(decode([int(i) for i in ids]).split())


def cells(name, hay, lengths):
    """Samples of a task over the grid, but for lengths that its fixed text alone exceeds."""
    task = task_named(name)
    for length in lengths:
        for depth in DEPTHS if task.uses_depth else [0]:
            try:
                sample = task.sample(hay, length, depth, seed=3)
            except ValueError as error:
                if "shorter than the prompt" not in str(error) or length > 256:
                    raise
                continue
            yield task, length, depth, sample


@pytest.mark.fast_cases(9)
@TWO
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "lengths", [LENGTHS[:-1], pytest.param(LENGTHS[-1:], marks=pytest.mark.slow)], ids=str
)
def test_every_cell_is_exact_to_the_token_and_holds_its_needles(lengths, name, hay, read):
    check_cells(name, hay, read, lengths)


@pytest.mark.slow
@OTHERS
def test_cells_are_as_exact_with_other_tokenizers(hay, read):
    """Every task, at the lengths where its text is most of the prompt."""
    for name in TASKS:
        check_cells(name, hay, read, LENGTHS[:2])


def check_cells(name, hay, read, lengths):
    """Compare all samples, and how many there are, with what a reader of their text finds."""
    seen = 0
    for task, length, depth, sample in cells(name, hay, lengths):
        coder = hay.tokenizer
        assert len(sample.prompt_ids) == length
        assert np.flatnonzero(sample.prompt_ids == coder.bos).tolist() == [0]
        assert coder.eos not in sample.prompt_ids
        assert 0 <= sample.prompt_ids.min() <= sample.prompt_ids.max() < coder.vocab_size
        text = read(sample.prompt_ids)
        for place in sample.spans:
            # first_sentence begins the hay, which comes to its sentence again at the end
            assert text.count(place.text) == 1 or (name, length) == ("first_sentence", 32_768)
            assert place.text in read(sample.prompt_ids[place.start : place.stop])
        answers = answers_by_search(name, text)
        assert answers == list(sample.references), (length, depth)
        assert read(sample.answer_ids) == sample.answer.strip() == ", ".join(answers)
        whole = read([*sample.prompt_ids, *sample.answer_ids])
        assert whole == f"{text} {sample.answer.strip()}"
        assert task.score(sample, sample.answer) == 1
        assert task.score(sample, sample.answer + " and so on") == 1 or name == "first_sentence"
        assert task.score(sample, other_answer(name, task, hay, length, depth, sample)) == 0
        assert task.score(sample, "") == 0
        seen += 1
    assert seen >= (2 * len(lengths) if task_named(name).uses_depth else max(1, len(lengths) - 1))


def answers_by_search(name, text):
    """What a reader of the prompt's text would answer."""
    if name == "passkey":
        return re.findall(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", text)
    if name == "needle":
        return re.findall(r"thing to do in [A-Z][\w ]+ is (eat [\w ]+\.)", text)
    if name == "first_sentence":
        return [text.split(".")[0] + "."]
    if name == "variable_tracking":
        value = re.findall(r"hold the value (\d+)\?", text)[0]
        held = dict(re.findall(r"VAR (\w+) = ((?:VAR )?\w+)", text))
        chain = [name for name, found in held.items() if found == value]
        while after := [name for name, found in held.items() if found == f"VAR {chain[-1]}"]:
            chain += after
        return chain
    if name == "key_values":
        (asked,) = re.findall(r" (\w+):$", text)
        return [number for key, number in re.findall(r"(\w+): (\d\d)", text) if key == asked]
    if name == "common_words":
        words = text.split("others. ")[1].split(" Which")[0].split()
        counts = Counter(words).most_common(11)
        assert counts[9][1] == counts[0][1] > counts[10][1]
        return [word for word, _ in counts[:10]]  # ties in the order of first appearance
    if name == "frequent_words":
        words = text.split("dots. ")[1].split(" Which")[0].split()
        counts = Counter(word for word in words if set(word) != {"."}).most_common(4)
        assert len({number for _, number in counts}) == 4
        return [word for word, _ in counts[:3]]
    if name == "helmet_json_kv":
        asked = re.findall(r"Key: (\S+) Corresponding value:$", text)
        return [dict(re.findall(r'"([\w-]+)": "([\w-]+)"', text))[key] for key in asked]
    if name.startswith("helmet_"):
        (asked,) = re.findall(r"for (\S+) mentioned in the provided text\?", text)
        pairs = re.findall(r"special magic \w+ for ([\w-]+) is: ([\w-]+)\.", text)
        return [value for key, value in pairs if key == asked]
    asked = re.findall(r"magic numbers for ([\w, -]+)\? They are", text)[0].split(", ")
    pairs = re.findall(r"special magic numbers for ([\w-]+) is: (\d+)\.", text)
    assert len(pairs) == 4
    return [number for query in asked for key, number in pairs if key == query]


def other_answer(name, task, hay, length, depth, sample):
    """The answer to another question, or other words where the question is always the same."""
    if name in ("needle", "first_sentence"):
        return "".join(
            chr(ord(letter) + 1) if letter.isalpha() else " " for letter in sample.answer
        )
    return task.sample(hay, max(length, 1024), depth, seed=4).answer  # at 256 another may not fit


@TWO
@pytest.mark.parametrize("name", ["passkey", "needle"])
@pytest.mark.parametrize("length", [1000, 4099])
def test_depth_is_the_share_of_hay_before_the_needle(name, hay, length):
    task = task_named(name)
    starts = {
        depth: task.sample(hay, length, depth, seed=3).spans[0].start
        for depth in (0, 0.5, 11, 37.5, 50, 99, 100)
    }
    if name == "passkey":  # keys differ in length with depth; one key would not
        key = [Hidden(depth, "\nThe pass key is 12345.\n") for depth in starts]
        starts = {
            hidden.depth: hide(hay.noise, length, "There", [hidden], "\nWhat?", ["12345"])
            .spans[0]
            .start
            for hidden in key
        }
    room = starts[100] - starts[0]
    assert room > length / 3
    for depth, start in starts.items():
        assert start - starts[0] == round(room * depth / 100)


MIXED = (
    "Die Bäume blühten früh. 春が来て、花が咲いた。 Ça va très bien aujourd'hui 👩‍👩‍👧 là-bas. "
    * 40
)


def test_needles_halve_no_character():
    hay = Haystack(ByteTokenizer(), [MIXED])
    moved = set()
    for depth in np.linspace(0, 100, 101):
        sample = hide(hay, 2000, "", [Hidden(depth, "The needle.")], "\nWhere?", ["here"])
        (place,) = sample.spans
        before = bytes(sample.prompt_ids[1 : place.start].tolist())
        assert before.decode() == MIXED[: len(before.decode())]
        assert sample.prompt_ids[place.start : place.stop].tolist() == list(b"The needle.")
        moved.add(round((2000 - 1 - 11 - 7) * depth / 100) - len(before))
        text = bytes(sample.prompt_ids[1:].tolist()).decode(errors="replace")
        assert text.replace("The needle.", "").replace("\ufffd", "")[:900] == MIXED[:900]
    assert {0, 1, 2} <= moved <= {0, 1, 2, 3}


@TWO
def test_every_seed_has_a_needle_and_a_text_of_its_own(hay, read):
    task = Needle()
    samples = [task.sample(hay, 1000, 50, seed) for seed in range(8)]
    secrets = {sample.references[0] for sample in samples}
    begins = {read(sample.prompt_ids[:80])[60:] for sample in samples}
    assert len(secrets) == len(begins) == 8
    assert samples[0].references == (SECRET,)
    assert {len(secret.split()) for secret in secrets} == {12}
    text = " ".join(hay.text.split())
    for seed, sample in enumerate(samples):
        assert task.score(sample, sample.answer) == 1
        assert task.score(sample, samples[seed - 1].answer) == 0
        (place,) = sample.spans
        after = read(sample.prompt_ids[place.stop : place.stop + 60]).split(maxsplit=1)[1]
        assert after[:60] in text + " " + text  # the hay goes on where the needle was put
        other = task.sample(hay, 3000, 0, seed)
        assert other.references == sample.references


@TWO
def test_fu_mode_puts_the_needle_after_a_sentence(hay, read):
    task = Needle(mode="fu")
    first, last = (task.sample(hay, 3000, depth).spans[0].start for depth in (0, 100))
    for depth in FU_DEPTHS:
        sample = task.sample(hay, 3000, depth)
        (place,) = sample.spans
        before = read(sample.prompt_ids[: place.start])
        assert before.endswith(".") or depth in (0, 100)
        prompt = read(sample.prompt_ids)
        # the published script's prompt for models that are not behind an API
        assert "<|im_start|> This is a very long story book: <book> " in prompt
        assert prompt.endswith("do in San Francisco? Answer:")
        assert 0 <= first + round((last - first) * depth / 100) - place.start < 60
    assert FU_LENGTHS[:2] == (1000, 4256)
    assert FU_LENGTHS[-1] == 128_000
    assert FU_DEPTHS == (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
    assert len(FU_LENGTHS) == 40


def test_scores_of_fu_end_at_eleven_twelfths():
    hay = Haystack(ByteTokenizer())
    fu, exact = Needle(mode="fu"), Needle()
    sample = fu.sample(hay, 1000)
    for response, score, whole in (
        (sample.answer, 11 / 12, 1),
        (" Eat a sandwich and sit in Dolores Park on a sunny day", 10 / 12, 1),
        (f"I would {SECRET} Then the baker", 11 / 12, 1),
        ("day. sunny a on Park Dolores in sit and sandwich eat", 11 / 12, 0),
        ("eat a sandwich", 3 / 12, 0),
        ("The baker moves small crates", 0, 0),
        ("", 0, 0),
    ):
        assert fu.score(sample, response) == pytest.approx(score)
        assert exact.score(sample, response) == whole


def test_the_first_integer_is_the_passkey():
    task = task_named("passkey")
    sample = task.sample(Haystack(ByteTokenizer()), 600, seed=1)
    key = sample.references[0]
    for response, score in (
        (f" {key}.", 1),
        (f" 0{key}", 1),
        (f" {key}1", 0),
        (f" 7 or {key}", 0),
        (" none", 0),
        (f" is {key}, {key}", 1),
    ):
        assert task.score(sample, response) == score


def test_ruler_counts_references_in_the_response():
    task = task_named("variable_tracking")
    sample = task.sample(Haystack(ByteTokenizer()), 2000)
    names = sample.references
    assert len(set(names)) == 5
    assert task.score(sample, " ".join(names[:2]).lower()) == pytest.approx(2 / 5)
    assert task.score(sample, "".join(reversed(names))) == 1


def test_rouge_l_is_that_of_torchmetrics():
    text = pytest.importorskip("torchmetrics.text")
    metric = text.ROUGEScore(rouge_keys="rougeL")
    draw = random.Random(0)
    words = ["the", "The", "cat", "sat.", "on", "mat,", "it's", "3.14", "--", "a"]
    for _ in range(60):
        one, two = (" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(2))
        assert rouge_l(one, two) == pytest.approx(float(metric(two, one)["rougeL_fmeasure"]))
    assert rouge_l("春が 来て", "春が 来て") == 1  # which torchmetrics has as 0
    assert rouge_l("", "") == 0


def test_first_sentence_reads_the_first_line():
    task = task_named("first_sentence")
    sample = task.sample(Haystack(ByteTokenizer()), 2000)
    sentence = sample.references[0]
    assert task.score(sample, f" {sentence}\nQ: And the second?") == 1
    words = sentence.split()
    assert task.score(sample, " ".join(words[:-1])) == pytest.approx(
        2 * (len(words) - 1) / (2 * len(words) - 1)
    )


def test_samples_are_the_same_for_ever_and_for_every_tokenizer(hay):
    """Secrets written down; who changes them changes what earlier results mean."""
    secrets = {
        name: task_named(name).sample(hay, 2048, 25, seed=7).references[0]
        for name in TASKS
        if name not in ("common_words", "needle")
    }
    assert secrets == SECRETS
    first = task_named("multi_key").sample(hay, 2048, 25.0, seed=7)
    again = task_named("multi_key").sample(Haystack(hay.tokenizer), 2048, 25, seed=7)
    assert first.prompt_ids.tolist() == again.prompt_ids.tolist()
    assert first.references == again.references
    others = [task_named("multi_key").sample(hay, 2048, d, s) for d, s in ((25, 8), (26, 7))]
    assert len({first.references, *(other.references for other in others)}) == 3


SECRETS = {
    "passkey": "9956",
    "first_sentence": "Now and then the tailor cleans the wooden lamps.",
    "multi_key": "6510464",
    "multi_value": "4273198",
    "multi_query": "7701470",
    "variable_tracking": "GOKUZ",
    "frequent_words": "nesopu",
    "key_values": "88",
    "helmet_json_kv": "2c7502c8-e8f8-47ac-bf3d-df9e798b473c",
    "helmet_niah_mk_2": "1244082",
    "helmet_niah_mk_3": "e5aaddfc-b04a-4da7-91f4-7c18bf8bc1ad",
    "helmet_niah_mv": "7997727",
}


def test_hay_of_stored_tokens_is_the_documents_text(hay, read):
    coder = hay.tokenizer
    texts = ["The first one here.", "A second document."]
    parts = [[coder.bos, *ids.tolist(), coder.eos] for ids in coder.encode(texts)]
    ids = np.array([*coder.encode(["cut off."])[0], coder.eos, *parts[0], *parts[1]], np.uint16)
    stored = Haystack.of_tokens(coder, ids)
    assert stored.text.split() == ["cut", "off.", *" ".join(texts).split()]
    assert not {coder.bos, coder.eos} & set(stored.ids.tolist())
    sample = hide(stored, 700, "", [Hidden(50, " Needle 12.")], "\nWhich?", ["12"])
    assert read(sample.prompt_ids).count("A second document.") > 5


def test_pieces_join_to_the_text(request, hay):
    """No space of its own, no letter lost; where white space is normalized, a space may come."""
    coder = hay.tokenizer
    start = coder.encode(["the"])[0].tolist()
    for text in (" The", "The", "\nWhat", "\n\nQ:", ".", " 12345", "12345", "é"):
        joined = coder.decode([*start, *piece(coder, text)])
        if "normalizing" not in request.node.name:
            assert joined == f"the{text}"
        else:
            assert joined.replace(" ", "") == "the" + "".join(text.split())


def test_text_cannot_bring_a_second_bos(tmp_path):
    settings = {"user_defined_symbols": ["<|begin|>"], "model_type": "bpe"}
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces(**settings))
    coder = open_tokenizer(str(tmp_path), bos="<|begin|>")
    hay = Haystack(coder, ["One. <|begin|> Two.<|begin|>"])
    assert coder.bos in coder.encode([hay.text])[0]
    sample = task_named("needle").sample(hay, 500)
    assert np.flatnonzero(sample.prompt_ids == coder.bos).tolist() == [0]


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_an_empty_haystack_is_refused(texts):
    with pytest.raises(ValueError, match="the haystack is empty; expected texts with words"):
        Haystack(ByteTokenizer(), texts)


def test_bad_input_is_one_line():
    hay = Haystack(ByteTokenizer())
    with pytest.raises(ValueError, match=r"task 'niah' unknown; expected one of passkey, needle, "):
        task_named("niah")
    needle = Needle()
    object.__setattr__(needle, "mode", "Fu")  # past the type checker that runs in tests
    with pytest.raises(ValueError, match="mode 'Fu' unknown; expected 'exact' or 'fu'"):
        needle.__post_init__()
    with pytest.raises(ValueError, match="keys 0 must be 1 or more"):
        MultiKey(keys=0)
    for depth in (-1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="must be between 0 and 100 percent"):
            task_named("needle").sample(hay, 1000, depth)
    with pytest.raises(ValueError, match="no sentence of 5 to 50 words"):
        task_named("first_sentence").sample(Haystack(ByteTokenizer(), ["one two"]), 1000)


@TWO
@pytest.mark.parametrize("name", TASKS)
def test_the_shortest_length_is_named(name, hay):
    task = task_named(name)
    with pytest.raises(ValueError, match="length 9 is shorter than the prompt") as found:
        task.sample(hay, 9)
    assert "\n" not in str(found.value)
    # secrets are drawn anew for another length and can be some tokens longer
    least = int(re.findall(r"ask for (\d+) or more", str(found.value))[0]) + 40
    assert len(task.sample(hay, least).prompt_ids) == least


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
    model = byte_level(False)
    model.normalizer = normalizers.Lowercase()
    model.save(str(tmp_path / "tokenizer.json"))
    hay = Haystack(open_tokenizer(str(tmp_path / "tokenizer.json"), "<s>", "</s>"))
    with pytest.raises(ValueError, match="expected one that keeps text"):
        task_named("passkey").sample(hay, 1000)


def test_fewer_repeats_where_the_list_is_short():
    hay = Haystack(ByteTokenizer())
    for length in (700, 2048, 3000, 32_768):
        sample = CommonWords().sample(hay, length)
        text = bytes(sample.prompt_ids[1:].tolist()).decode()
        body = text.split("\n")[1]
        counts = Counter(body.split())
        # ten words of six letters and a space: twice, and more while they fill half of the rest
        repeats = min(30, (len(body) - 140) // 2 // 70 + 1)
        assert {counts[word] for word in sample.references} == {repeats}
        assert max(n for word, n in counts.items() if word not in sample.references) == max(
            1, repeats // 10
        )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(258, 32, 48, 2, 4, bos_token_id=256, eos_token_id=257), RoPE())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def theirs(llama, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = export_pretrained(llama, tmp_path_factory.mktemp("exported") / "out")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def samples_of_bytes(length=600):
    hay = Haystack(ByteTokenizer())
    names = ("passkey", "needle", "multi_key", "variable_tracking")
    return [task_named(name).sample(hay, length, seed=s) for name in names for s in range(2)]


def continued(model, sample, tokens):
    prompt = torch.from_numpy(sample.prompt_ids)[None]
    found = model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return found[0, len(sample.prompt_ids) :].numpy()


def test_teacher_forcing_is_the_loss_and_greedy_decoding_of_transformers(llama, theirs):
    samples = [
        sample._replace(answer_ids=continued(theirs, sample, 3 + number))
        for number, sample in enumerate(samples_of_bytes(500)[:4])
    ]
    for sample in list(samples):
        wrong = sample.answer_ids.copy()
        wrong[-1] = (wrong[-1] + 1) % 256
        samples.append(sample._replace(answer_ids=wrong))
    samples += samples_of_bytes(500)
    found = teacher_forced(llama, samples)
    assert [each.exact for each in found] == [True] * 4 + [False] * 12
    for sample, each in zip(samples, found, strict=True):
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.answer_ids]))[None]
        labels = ids.clone()
        labels[0, : len(sample.prompt_ids)] = -100
        with torch.no_grad():
            loss = float(theirs(ids, labels=labels).loss)
        assert len(each.nats) == len(sample.answer_ids)
        assert float(each.nats.mean()) == pytest.approx(loss, rel=1e-4)


def test_prompts_of_other_lengths_in_the_batch_change_nothing(llama):
    scheme = DynamicNTK(factor=4.0, original_context=256)
    model = Llama(llama.config, scheme)
    model.load_state_dict(llama.state_dict())
    samples = [*samples_of_bytes(500)[:2], *samples_of_bytes(700)[3:6]]
    for sample, each in zip(samples, teacher_forced(model, samples), strict=True):
        (alone,) = teacher_forced(model, [sample])
        np.testing.assert_allclose(each.nats, alone.nats, rtol=1e-4)


def test_answers_are_generated_greedily(llama, theirs):
    coder, task = ByteTokenizer(), task_named("passkey")
    samples = samples_of_bytes(500)[:2]
    found = generated(llama, coder, task, samples)
    for sample, answer in zip(samples, found, strict=True):
        ids = continued(theirs, sample, task.max_new_tokens).tolist()
        ends = ids.index(coder.eos) if coder.eos in ids else len(ids)
        assert answer == coder.decode(ids[:ends])
    with pytest.raises(ValueError, match="generate for one length at a time"):
        generated(llama, coder, task, [*samples, *samples_of_bytes(700)])
