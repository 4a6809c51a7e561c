import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_longctx.data.reading.faults import Broken, Faults
from lit_longctx.data.reading.inputs import files
from lit_longctx.data.reading.rows import READERS
from lit_longctx.data.tokens.chats import Conversation, Malformed, conversation

TURNS = (("system", "Be kind."), ("user", "Why?"), ("assistant", "Because."))
CHAT = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [
    {"from": name, "value": content}
    for name, (_, content) in zip(("system", "human", "gpt"), TURNS, strict=True)
]
GOOD = {
    "messages": ({"messages": CHAT}, TURNS),
    "without system": ({"messages": CHAT[1:]}, TURNS[1:]),
    "four turns": ({"messages": CHAT + CHAT[1:]}, TURNS + TURNS[1:]),
    "sharegpt": ({"conversations": SHAREGPT}, TURNS),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        (("user", "Add.\n\n1 2"), ("assistant", "3")),
    ),
    "alpaca without input": (
        {"instruction": "Sing.", "input": "", "output": "La"},
        (("user", "Sing."), ("assistant", "La")),
    ),
    "alpaca with null": (
        {"instruction": "Sing.", "input": None, "output": "La"},
        (("user", "Sing."), ("assistant", "La")),
    ),
    "document": (
        {"document": "Long.", "question": "How?", "answer": "So."},
        (("user", "Long.\n\nHow?"), ("assistant", "So.")),
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("a ", "b")]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ]
        },
        (("user", "a b"), ("assistant", "c")),
    ),
    "sharegpt's words in messages": (
        {"messages": [{"role": r, "content": c} for r, c in (("human", "a"), ("gpt", "b"))]},
        (("user", "a"), ("assistant", "b")),
    ),
    "chat's words in sharegpt": (
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        (("user", "a"), ("assistant", "b")),
    ),
    "chat's fields in sharegpt": ({"conversations": CHAT}, TURNS),
    "system beside messages": ({"system": "Be kind.", "messages": CHAT[1:]}, TURNS),
    "system prompt beside conversations": (
        {"system_prompt": "Be kind.", "conversations": SHAREGPT[1:]},
        TURNS,
    ),
    "system beside alpaca": (
        {"system": "Be kind.", "instruction": "Why?", "input": "", "output": "Because."},
        TURNS,
    ),
    "empty system beside messages": ({"system": "", "messages": CHAT}, TURNS),
    "dolly": (
        {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"},
        (("user", "Sum up.\n\nLong."), ("assistant", "Short.")),
    ),
    "dolly without context": (
        {"instruction": "Sing.", "context": "", "response": "La"},
        (("user", "Sing."), ("assistant", "La")),
    ),
    "ultrachat": ({"prompt": "Why?", "prompt_id": "7", "messages": CHAT}, TURNS),
    "labels of a message": (
        {"messages": [{**message, "id": 1, "tool_calls": []} for message in CHAT]},
        TURNS,
    ),
    "empty fields": ({"messages": CHAT, "tools": [], "history": None, "notes": ""}, TURNS),
    "space around": (
        {"instruction": " Sing.\n", "output": "\n La "},
        (("user", " Sing.\n"), ("assistant", "\n La ")),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_row_says_its_turns(name):
    row, expected = GOOD[name]
    found = conversation(row, "file:7", "some")
    assert tuple((message.role, message.content) for message in found.messages) == expected
    assert all(message.learnt for message in found.messages)
    assert found[1:] == ("file:7", "some", 5 if name == "document" else 0)


def test_the_document_is_where_it_is_said_to_be():
    document = " Ünï\n\ncode 👩 "
    found = conversation({"document": document, "question": "?", "answer": "!"}, "", "")
    assert found.messages[0].content[: found.document] == document


@pytest.mark.parametrize(
    ("key", "expected"), [("x", "x"), (7, "7"), (0, "0"), ("", "n"), (None, "n")]
)
def test_a_row_may_name_itself(key, expected):
    assert conversation({"messages": CHAT, "id": key}, "n", "s").id == expected


def test_the_document_is_found_behind_a_system_prompt():
    row = {"system": "Be kind.", "document": "Long.", "question": "?", "answer": "!"}
    found = conversation(row, "", "")
    assert [message.role for message in found.messages] == ["system", "user", "assistant"]
    assert found.messages[1].content[: found.document] == "Long."


@pytest.mark.parametrize("spelled", [("train", False, True), ("weight", 0, 1), ("weight", 0.0, 1)])
def test_an_answer_may_be_one_not_to_learn(spelled):
    key, no, yes = spelled
    turns = [{**CHAT[1], key: no}, {**CHAT[2], key: no}, CHAT[1], {**CHAT[2], key: yes}]
    found = conversation({"messages": turns}, "", "").messages
    assert [message.learnt for message in found] == [False, False, True, True]


def test_a_field_is_a_label_where_that_is_said():
    row = {"messages": CHAT, "rating": 0.9}
    with pytest.raises(Malformed, match=r"field 'rating' is not read \(a label\? --reader\.labels"):
        conversation(row, "n", "s")
    assert conversation(row, "n", "s", {"rating"}) == conversation({"messages": CHAT}, "n", "s")


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def answered(content):
    return chat(("user", "a"), ("assistant", content))


PARTS = "content has parts other than text"


def not_read(name):
    return f"field {name!r} is not read (a label? --reader.labels [{name!r}])"


BAD = {
    **{
        f"{name} beside messages": ({name: value, "messages": CHAT}, not_read(name))
        for name, value in {
            "context": "THE PASSAGE",
            "history": [["a", "b"]],
            "tools": [{"name": "f"}],
            "text": "other",
            "train": False,
            "weight": 0,
            "conversations": SHAREGPT,
            "input": "a",
            "a\nb": "c",
        }.items()
    },
    **{
        f"{name} in a message": ({"messages": [CHAT[1], {**CHAT[2], name: value}]}, not_read(name))
        for name, value in {
            "reasoning_content": "hm",
            "thinking": "hm",
            "name": "Eve",
            "tool_call_id": "1",
            "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
        }.items()
    },
    "two system prompts": ({"system": "a", "messages": CHAT}, "two system prompts"),
    "two spellings of it": (
        {"system": "a", "system_prompt": "b", "messages": CHAT[1:]},
        "fields system and system_prompt together",
    ),
    "alpaca and dolly": (
        {"instruction": "a", "input": "b", "context": "c", "output": "d"},
        "fields input and context together",
    ),
    "content and value": (
        {"messages": [{**CHAT[1], "value": "b"}, CHAT[2]]},
        "fields content and value together",
    ),
    "system prompt as list": ({"system": ["a"], "messages": CHAT[1:]}, PARTS),
    "half a weight": ({"messages": [CHAT[1], {**CHAT[2], "weight": 0.5}]}, "message weights"),
    "train as text": ({"messages": [CHAT[1], {**CHAT[2], "train": "no"}]}, "message weights"),
    "a question to learn": (
        {"messages": [{**CHAT[1], "train": True}, CHAT[2]]},
        "a question to learn",
    ),
    "nothing to learn": (
        {"messages": [CHAT[1], {**CHAT[2], "train": False}]},
        "no answer to learn",
    ),
    "list": ([], "row is no object"),
    "text": ("a", "row is no object"),
    "broken": (Broken("broken JSON"), "broken JSON"),
    "empty object": ({}, "unknown format"),
    "text field": ({"text": "a"}, "unknown format"),
    "null messages": ({"messages": None}, "unknown format"),
    "prompt": ({"prompt": "a", "completion": "b"}, "unknown format"),
    "no messages": ({"messages": []}, "no messages"),
    "messages as text": ({"messages": "user: a"}, "messages are no list"),
    "messages as object": ({"messages": {"role": "user"}}, "messages are no list"),
    "message as text": ({"messages": ["a"]}, "message is no object"),
    "null message": ({"messages": [None]}, "message is no object"),
    "tool role": (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "unknown role"),
    "capital role": (chat(("User", "a"), ("assistant", "c")), "unknown role"),
    "role as list": (chat((["user"], "a"), ("assistant", "c")), "unknown role"),
    "no role": ({"messages": [{"content": "a"}]}, "unknown role"),
    "role as list in sharegpt": (
        {"conversations": [{"from": ["gpt"], "value": "a"}]},
        "unknown role",
    ),
    "tool calls": (
        {"messages": [CHAT[1], {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}]},
        "tool calls",
    ),
    "only user": (chat(("user", "a")), "no assistant turn"),
    "only system": (chat(("system", "a")), "no assistant turn"),
    "system and user": (chat(("system", "a"), ("user", "b")), "no assistant turn"),
    "ends with user": (
        chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        "no answer to the last question",
    ),
    "two users": (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "roles out of order"),
    "two answers": (
        chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "roles out of order",
    ),
    "assistant first": (chat(("assistant", "a"), ("user", "b")), "roles out of order"),
    "late system": (
        chat(("user", "a"), ("system", "b"), ("assistant", "c")),
        "roles out of order",
    ),
    "two systems": (
        chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        "roles out of order",
    ),
    "empty answer": (answered(""), "empty text"),
    "white answer": (answered(" \n"), "empty text"),
    "empty system": (chat(("system", ""), ("user", "a"), ("assistant", "b")), "empty text"),
    "null answer": (answered(None), "content is no string"),
    "missing answer": ({"messages": [CHAT[1], {"role": "assistant"}]}, "content is no string"),
    "number": (answered(7), "content is no string"),
    "object": (answered({"text": "a"}), "content is no string"),
    "empty list": (answered([]), "empty text"),
    "list of texts": (answered(["a"]), "content has parts other than text"),
    "image": (
        answered([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "b"}]),
        "content has parts other than text",
    ),
    "nested part": (answered([{"type": "text", "text": ["a"]}]), "content is no string"),
    "NUL": (answered("a\0b"), "NUL in text"),
    "NUL in question": (chat(("user", "\x000\0"), ("assistant", "b")), "NUL in text"),
    "lone surrogate": (answered("a\ud800"), "lone surrogate"),
    "alpaca without output": ({"instruction": "a", "input": "b"}, "content is no string"),
    "alpaca with empty output": ({"instruction": "a", "output": ""}, "empty text"),
    "alpaca with number": ({"instruction": 7, "output": "b"}, "content is no string"),
    "alpaca with other input": (
        {"instruction": "a", "input": 7, "output": "b"},
        "content is no string",
    ),
    "white document": ({"document": " ", "question": "a", "answer": "b"}, "empty text"),
    "no question": ({"document": "a", "answer": "b"}, "content is no string"),
    "no answer": ({"document": "a", "question": "b"}, "content is no string"),
    "empty answer on document": (
        {"document": "a", "question": "b", "answer": ""},
        "empty text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_says_why(name):
    row, reason = BAD[name]
    with pytest.raises(Malformed) as found:
        conversation(row, "n", "s")
    assert str(found.value) == reason


def test_reasons_are_few_and_counted():
    faults = Faults(tolerated=1.0)
    for name, (row, _) in BAD.items():
        try:
            conversation(row, name, "s")
        except Malformed as error:
            faults.add(str(error), name)
    assert faults.kinds.total() == len(BAD)
    assert faults.kinds["unknown role"] == 5
    assert faults.examples["tool calls"] == "tool calls"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", GOOD)
def test_rows_of_files_are_the_same_conversations(tmp_path, kind, name):
    row, _ = GOOD[name]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (file,) = files(str(path))
    ((_, found),) = READERS[file.kind](file, None, 2**20)
    expected = conversation(row, "n", "s")
    assert isinstance(expected, Conversation)
    assert conversation(found, "n", "s") == expected
