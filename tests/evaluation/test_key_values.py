"""Prompts read back as text; a trained model's answers teacher_forced and generated, one by one."""

import re

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_longctx.batch import pack
from lit_longctx.data.making import synthetic
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.evaluation.retrieval.key_values import KeyValues
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.scoring import generated, teacher_forced
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

LENGTHS = [64, 257, 1024, 6000]
DEPTHS = [0, 12.5, 50, 100]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def hay(request, tmp_path_factory):
    if request.param == "bytes":
        return Haystack(ByteTokenizer())
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    model.train_from_iterator([synthetic.text(synthetic.KeyValues().draw(600))], trainer)
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(file))
    return Haystack(open_tokenizer(str(file), "<s>", "</s>"), ["No line of these is seen."])


def lines_of(hay, sample):
    """First line, whole lines as pairs, and question."""
    first, *lines, question = hay.tokenizer.decode(sample.prompt_ids.tolist()).split("\n")
    whole = [line for line in lines if re.fullmatch(r"[A-Za-z]{2,3}: \d\d", line)]
    pairs = [tuple(line.split(": ")) for line in whole]
    assert len(lines) - len(pairs) <= 1, "more than one line is cut short"
    return first, pairs, question


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_prompt_is_a_document_of_the_training_rows_with_its_question(hay, length, depth):
    """Word for word what `synthetic.text` writes, but for one line that is cut short."""
    sample = KeyValues().sample(hay, length, depth, seed=3)
    assert len(sample.prompt_ids) == length
    assert sample.prompt_ids[0] == hay.tokenizer.bos
    first, pairs, question = lines_of(hay, sample)
    held = dict(pairs)
    assert len(held) == len(pairs)
    (key,) = re.fullmatch(r"(\w+):", question).groups()
    assert sample.references == (held[key],)
    document = "\n".join([first, *map(": ".join, pairs)])
    written = synthetic.text([{"document": document, "question": question, "answer": held[key]}])
    assert written == f"{document}\n{question}{sample.answer}"
    shown = synthetic.KeyValues().draw(len(pairs))[0]
    assert shown["document"].startswith(f"{first}\n")
    assert re.sub(r"\w+", "", shown["question"]) == re.sub(r"\w+", "", question)


@pytest.mark.parametrize("length", LENGTHS)
def test_depth_counts_the_lines_before_the_asked_one(hay, length):
    for depth in (0, 1, 30, 50, 77, 100):
        sample = KeyValues().sample(hay, length, depth, seed=1)
        _, pairs, question = lines_of(hay, sample)
        keys = [key for key, _ in pairs]
        assert keys.index(question[:-1]) == round((len(keys) - 1) * depth / 100)
        (place,) = sample.spans
        assert place.text == f"{question[:-1]}: {sample.references[0]}"
        shown = hay.tokenizer.decode(sample.prompt_ids[place.start : place.stop].tolist())
        assert shown == f"\n{place.text}"


def test_lines_of_bytes_are_cut_to_the_byte():
    """A line has seven bytes, so that seven lengths end on as many different cuts."""
    hay = Haystack(ByteTokenizer())
    texts = []
    for length in range(100, 107):
        ids = KeyValues().sample(hay, length, 50).prompt_ids
        texts.append(bytes(ids[1:].tolist()).decode().split("\n"))
    assert sorted(len(lines[-2]) for lines in texts) in (
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 1, 2, 3, 4, 5],
    )


def test_seeds_lengths_and_depths_ask_for_other_keys(hay):
    cells = [(300, 50, 1), (300, 50, 2), (301, 50, 1), (300, 51, 1)]
    samples = [KeyValues().sample(hay, *cell) for cell in cells]
    assert len({sample.spans[0].text for sample in samples}) == 4
    bare = Haystack(ByteTokenizer())
    for cell, sample in zip(cells, samples, strict=True):
        assert KeyValues().sample(bare, *cell).spans[0].text == sample.spans[0].text


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" {}", 1),
        ("{}", 1),
        (" {}\nab? 12", 1),
        ("\n{}.", 1),
        (" {}0", 0),
        (" 1{}", 0),
        (" is {}", 0),
        ("", 0),
    ],
)
def test_the_response_must_begin_with_the_value(response, score):
    sample = KeyValues().sample(Haystack(ByteTokenizer()), 200)
    assert KeyValues().score(sample, response.format(sample.references[0])) == score


def test_the_shortest_length_has_one_token_of_another_line(hay):
    with pytest.raises(ValueError, match=r"ask for (\d+) or more") as found:
        KeyValues().sample(hay, 9)
    least = int(re.findall(r"ask for (\d+)", str(found.value))[0])
    assert len(KeyValues().sample(hay, least + 2).prompt_ids) == least + 2


def taught(samples, steps):
    """A small model that has learned the answers to these samples, and only to these, by heart."""
    llama = Llama(LlamaConfig(258, 64, 128, 2, 4, bos_token_id=256, eos_token_id=257), RoPE(100.0))
    generator = torch.Generator().manual_seed(0)
    for weight in llama.parameters():
        torch.nn.init.ones_(weight) if weight.ndim < 2 else weight.data.normal_(
            0.0, weight.shape[1] ** -0.5, generator=generator
        )
    rows = [[*sample.prompt_ids, *sample.answer_ids, ord("\n")] for sample in samples]
    rows = [torch.tensor(np.asarray(row)) for row in rows]
    batch = pack(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1), bos=256)
    for weights, sample in zip(batch.loss_weights, samples, strict=True):
        weights[: len(sample.prompt_ids) - 1] = 0
    optimizer = torch.optim.AdamW(llama.parameters(), lr=2e-3)
    for _ in range(steps):
        (llama.loss(batch)[0] / batch.loss_weights.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return llama.eval()


@pytest.mark.slow
def test_teacher_forcing_says_of_every_prompt_what_generation_would():
    """One by one for 200 prompts of four lengths and five depths, of which about half are known."""
    task, coder = KeyValues(), ByteTokenizer()
    hay = Haystack(coder)
    cells = [(length, depth) for length in (40, 51, 62, 73) for depth in (0, 25, 50, 75, 100)]
    known = {cell: [task.sample(hay, *cell, seed) for seed in range(5)] for cell in cells}
    llama = taught([sample for samples in known.values() for sample in samples], steps=150)
    pairs = []
    for cell, samples in known.items():
        asked = [*samples, *(task.sample(hay, *cell, seed) for seed in range(5, 10))]
        answers = generated(llama, coder, task, asked)
        found = [each.exact for each in teacher_forced(llama, asked)]
        pairs += zip(asked, found, answers, strict=True)
    assert len(pairs) == 200
    assert 60 < sum(exact for _, exact, _ in pairs) < 140
    longer = []  # " 12" is said, and then another digit: another number
    for sample, exact, answer in pairs:
        assert exact == answer.startswith(sample.answer)
        if exact and answer[len(sample.answer) :][:1].isdigit():
            longer.append(answer)
        else:
            assert task.score(sample, answer) == exact
    assert len(longer) <= 4
