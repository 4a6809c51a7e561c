"""Rows of conversations: what they hold, who counts, and that steps do not depend on the layout."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from data.test_pretraining import attach

from lit_longctx.batch import NO_TARGET
from lit_longctx.data.finetuning import ChatSource, FinetuneData
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.sampling.conversations import Conversations
from lit_longctx.data.sampling.position_transforms import PoSE
from lit_longctx.data.sampling.steps import HeldOut, Steps
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

BOS, EOS = 256, 257
WINDOW, ROWS = 256, 4


def chats(number: int) -> list[dict]:
    """Dialogues of one to three turns, of different lengths."""
    seeded = random.Random(0)
    found = []
    for i in range(number):
        turns = seeded.randint(1, 3)
        said = [(f"q{i} {'a' * seeded.randint(0, 20)}", f"r{i}.{t}") for t in range(turns)]
        messages = [
            {"role": role, "content": text}
            for pair in said
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        found.append({"messages": messages})
    return found


def questions(number: int) -> list[dict]:
    """Rows with documents shorter and longer than a window."""
    return [
        {"document": f"{i}: " + "abc " * (20 * i), "question": f"Which? {i}", "answer": f"{i}!"}
        for i in range(number)
    ]


def told(row: dict) -> list[tuple[str, bool]]:
    """A row in the plain template's words, written by hand: text, and whether it is an answer."""
    if "messages" in row:
        said = [(m["role"], m["content"]) for m in row["messages"]]
    else:
        said = [("user", f"{row['document']}\n\n{row['question']}"), ("assistant", row["answer"])]
    pieces = [("<bos>", False)]
    for role, text in said:
        own = role == "assistant"
        pieces += [(f"<|{role}|>\n", False), (text, own), ("<eos>", own), ("\n", False)]
    return pieces


def ids_of(pieces: list[tuple[str, bool]]) -> list[tuple[int, bool]]:
    marks = {"<bos>": [BOS], "<eos>": [EOS]}
    return [(i, own) for text, own in pieces for i in marks.get(text) or text.encode()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetuning")
    for name, rows in (("chat", chats(80)), ("long", questions(24))):
        file = path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare([str(file)], str(path / name), chat=True, held_out=0.1, chunk_tokens=1024)
    return path


def data(folder: Path, **settings) -> FinetuneData:
    sources = {
        "chat": ChatSource(str(folder / "chat"), settings.pop("weight", None)),
        "long": ChatSource(str(folder / "long"), settings.pop("long", None), packing="none"),
    }
    if settings.get("sorted"):
        sources["chat"] = ChatSource(str(folder / "chat"), packing="none")
    return FinetuneData(sources, WINDOW, ROWS * WINDOW, **settings)


def conversations_of(batch, row: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Ids and weights of each conversation of a row; the weight of a token as a target."""
    number = batch.documents.ids[row]
    found = []
    for i in number.unique().tolist():
        inside = (number == i).nonzero().flatten()
        weights = [0.0, *batch.loss_weights[row][inside[:-1]].tolist()]
        found.append((tuple(batch.input_ids[row][inside].tolist()), tuple(weights)))
    return found


def test_rows_hold_whole_conversations_and_know_their_answers(folder):
    """All of an epoch: every conversation once, ids and weights as written by hand."""
    expected = Counter()
    for row in chats(80) + questions(24):
        pairs = ids_of(told(row))
        while len(pairs) > WINDOW:  # the document loses its end
            del pairs[pairs.index((ord("W"), False)) - 3]
        ids, answers = zip(*pairs, strict=True)
        expected[ids, tuple(map(float, answers))] += 1
    module = data(folder)
    found = Counter()
    for split in (module.readers, module.held_out):
        readers = dict(enumerate(split(module.longest).values()))
        for source, reader in readers.items():
            for number in range(len(reader)):
                batch = module.batch(readers, [(source, number, 0)], training=True)
                for ids, weights in conversations_of(batch, 0):
                    if any(weights):
                        found[ids, weights] += 1
    assert found == expected


def test_what_a_row_says_is_learnt_or_it_is_refused(tmp_path):
    """`train: false` is read and not learnt; fields that are read or refused, none dropped."""
    hi, bad = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "BADBAD"}
    turns = [hi, {**bad, "train": False}, hi, {"role": "assistant", "content": "GOOD"}]
    rows = [
        {"messages": turns},
        {"instruction": "Sum up", "context": "THE PASSAGE", "output": "Short."},
        {"system_prompt": "BE BRIEF", "messages": [hi, {"role": "assistant", "content": "Yo"}]},
        {"messages": turns, "mood": "grave"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out")
    content = prepare(str(tmp_path / "rows.jsonl"), out, chat=True, held_out=0, tolerated=0.5)
    assert [fault["count"] for fault in content["broken"].values()] == [1]
    assert "'mood' is not read" in next(iter(content["broken"]))
    learnt, texts = [], []
    for ids, answers in iter(Conversations(out, "train", WINDOW)):
        learnt.append(bytes(ids[answers & (ids < 256)].tolist()).decode())
        texts.append(bytes(ids[ids < 256].tolist()).decode())
    assert learnt == ["GOOD", "Short.", "Yo"]
    assert "BADBAD" in texts[0]
    assert "Sum up\n\nTHE PASSAGE" in texts[1]
    assert "<|system|>\nBE BRIEF" in texts[2]
    assert content["splits"]["train"]["answer_tokens"] == sum(len(text) + 1 for text in learnt)


def test_what_is_cut_and_left_out_is_told(folder, tmp_path):
    lengths = [len(ids_of(told(row))) for row in questions(24)]
    report = data(folder).readers(data(folder).longest)["long"].report()
    held_out = len(Conversations(str(folder / "long"), "held_out", WINDOW))
    assert f"{24 - held_out} conversations" in report
    cut = sum(length > WINDOW for length in lengths)
    told_cut = int(report.split(", ")[1].split()[0])
    assert 0 < cut - held_out <= told_cut <= cut
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a" * 600},
                {"role": "assistant", "content": "b"},
            ]
        }
    ]
    rows += chats(20)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], str(tmp_path / "out"), chat=True, held_out=0)
    found = Conversations(str(tmp_path / "out"), "train", WINDOW)
    assert "1 left out: longer than the window" in found.report()
    assert len(found) == 20


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"sorted": True}, {"weight": 3.0, "long": 1.0}])
def test_steps_are_the_same_on_any_layout(folder, ranks, settings):
    places = PoSE(1024)
    alone = Steps(data(folder, position_transform=places, **settings), 0, 1)
    parts = [
        Steps(
            data(
                folder,
                position_transform=places,
                micro_batch_size=2 if ranks == 1 else 1,
                **settings,
            ),
            r,
            ranks,
        )
        for r in range(ranks)
    ]
    for step in (0, 1, 17):
        expected = [row for batch in alone[step].micro_batches for row in described(batch)]
        found = [row for part in parts for b in part[step].micro_batches for row in described(b)]
        assert found == expected


def described(batch) -> list[tuple]:
    """Rows without their padding, which depends on the neighbours."""
    columns = (
        batch.samples,
        batch.sources,
        batch.input_ids,
        batch.position_ids,
        batch.loss_weights,
    )
    found = []
    for sample, source, ids, places, weights in zip(*columns, strict=True):
        size = int((weights > 0).nonzero().max()) + 1
        values = (x[:size].tolist() for x in (ids, places, weights))
        found.append((int(sample), int(source), *values))
    return found


def test_sorted_steps_hold_neighbours_in_length(folder):
    module = data(folder, sorted=True)
    readers = module.readers(module.longest)
    order = module.order(readers, module.longest)
    lengths = [reader.conversations.lengths for reader in readers.values()]
    groups = sum(-(-len(each) // ROWS) for each in lengths)
    seen, firsts = Counter(), []
    for step in range(groups):
        rows = [order(step * ROWS + i) for i in range(ROWS)]
        (source,) = {source for source, _ in rows}
        sizes = [int(lengths[source][i]) for _, i in rows]
        every = sorted(lengths[source].tolist())
        assert any(every[at : at + ROWS] == sorted(sizes) for at in range(len(every)))
        seen.update(rows)
        firsts.append(sizes[0])
    assert set(seen) == {(s, i) for s, each in enumerate(lengths) for i in range(len(each))}
    assert sum(seen.values()) == groups * ROWS
    assert firsts != sorted(firsts)


def test_micro_batches_are_as_wide_as_their_longest_row(folder):
    """And the model's nats are those of full windows."""
    module = data(folder)
    readers = dict(enumerate(module.readers(module.longest).values()))
    shortest = min(range(len(readers[1])), key=lambda i: int((readers[1][i].tokens >= 0).sum()))
    batch = module.batch(readers, [(1, shortest, 0)], training=True)
    used = int((readers[1][shortest].tokens >= 0).sum())
    assert used <= batch.input_ids.shape[1] < WINDOW
    full = module.batch(readers, [(1, shortest, 0), (1, len(readers[1]) - 1, 1)], training=True)
    assert full.input_ids.shape[1] == WINDOW
    llama = Llama(LlamaConfig(258, 32, 64, 2, 2), RoPE())
    with torch.no_grad():
        found, expected = llama(batch)[0], llama(full)[0]
    torch.testing.assert_close(found[: used - 1], expected[: used - 1], atol=1e-5, rtol=1e-5)


def test_validation_is_on_answers_where_they_stand(folder):
    module = data(folder, input_loss=1.0, position_transform=PoSE(4096))
    batch = HeldOut(module, 0, 1)[0, 0]
    targets = bytes(t for t in batch.labels[0].tolist() if t not in (NO_TARGET, EOS)).decode()
    documents = batch.documents.lengths()[0]
    assert targets.startswith("r")
    assert set(targets) <= set("r.0123456789")  # of what is said, answers alone are such
    assert int(batch.position_ids.max()) < int(documents.max())
    trained = Steps(module, 0, 1)[0].micro_batches[0]
    assert int(trained.position_ids.max()) > WINDOW


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_loss": 1.5}, "input_loss between 0 and 1; got 1.5"),
        ({"weight": 2.0}, "sources need a weight each"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        data(folder, **settings)


def test_sorting_needs_rows_of_one_and_enough_of_them(folder):
    source = {"chat": ChatSource(str(folder / "chat"))}
    with pytest.raises(ValueError, match="needs packing none"):
        FinetuneData(source, WINDOW, WINDOW, sorted=True)
    source = {"chat": ChatSource(str(folder / "chat"), packing="none")}
    module = FinetuneData(source, WINDOW, 1000 * WINDOW, sorted=True)
    with pytest.raises(ValueError, match="needs 1000 conversations of a source for a step"):
        Steps(module, 0, 1)


def test_documents_and_conversations_are_not_taken_for_each_other(folder, tmp_path):
    (tmp_path / "a.txt").write_text("text " * 200)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "plain"), held_out=0, chunk_tokens=1024)
    with pytest.raises(
        ValueError, match=r"expected conversations in .*plain; got documents; .*with"
    ):
        FinetuneData({"x": ChatSource(str(tmp_path / "plain"))}, WINDOW, WINDOW)
    with pytest.raises(ValueError, match=r"expected documents in .*chat; got conversations"):
        PretrainData({"x": Source(str(folder / "chat"))}, WINDOW, WINDOW)


def test_questions_on_one_document_are_held_out_together(tmp_path):
    rows = [
        {"document": f"{i} " * 9, "question": f"{j}?", "answer": str(j)}
        for i in range(40)
        for j in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], str(tmp_path / "out"), chat=True, held_out=0.3)
    documents = []
    for split in ("train", "held_out"):
        found = Conversations(str(tmp_path / "out"), split, WINDOW)
        texts = (bytes(i for i in found[n][0].tolist() if i < 256) for n in range(len(found)))
        documents.append({text.split()[1] for text in texts})
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) == 40
    assert min(map(len, documents)) > 3


def test_a_run_reads_on_where_it_was(folder):
    whole = Steps(data(folder), 0, 1)
    loader = attach(data(folder), step=5, consumed=5 * ROWS).train_dataloader()
    assert described(next(iter(loader)).micro_batches[0]) == described(whole[5].micro_batches[0])
