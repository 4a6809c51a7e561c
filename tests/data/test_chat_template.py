import io
import json
import random
import resource
from datetime import datetime
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from test_tokenizer import random_texts
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lit_longctx import cli
from lit_longctx.data.tokens import template_process
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Conversation, Malformed, Message, conversation
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.rendering import compiled
from lit_longctx.data.tokens.tokenizer import ByteTokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATES = ("llama2", "llama3", "chatml", "mistral", "zephyr", "gemma")
NO_SYSTEM = ("mistral", "gemma")
CORPUS = [
    "the quick brown fox jumps over the lazy dog. Hello, how are you?\n\nassistant\nuser system",
    "Hi [INST] there [/INST] model <<SYS>> fine <|user|> <|assistant|> <|im_end|> </s> answer",
]


def source(name):
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()


def trained(kind):
    """A small tokenizer of the kind of: Llama 3 and Qwen, Mistral, Llama 2, Unigram (T5)."""
    if kind == "unigram":
        model = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        )
    else:
        model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "byte-level" else []
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        )
    if kind == "byte-level":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    elif kind == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        model.normalizer = normalizers.Sequence(steps)
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first", split=kind == "unigram"
        )
    model.train_from_iterator(CORPUS * 5, trainer)
    return model


def write(folder, model, **config):
    """A tokenizer that puts BOS in front of a text."""
    folder.mkdir(exist_ok=True)
    known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **known, **config}
    bos = config["bos_token"]
    model.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = ("byte-level", "first", "prepend", "unigram")


@pytest.fixture(scope="module", params=KINDS)
def any_folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokenizer") / request.param, trained(request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokenizer") / "bytes", trained("byte-level"))


def theirs_of(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def ours_of(folder, template, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(source(template) if template in TEMPLATES else template)
    return ChatTemplate(open_tokenizer(str(folder)), str(file))


def talk(*contents, system=None, document=0):
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    first = [Message("system", system)] if system else []
    return Conversation((*first, *messages), "name", "source", document)


def dicts(chat):
    return [message._asdict() for message in chat.messages]


def reference(theirs, template, chat, **settings):
    """Ids by transformers, with BOS in front if the template writes none."""
    ids = theirs.apply_chat_template(
        dicts(chat), chat_template=template, return_dict=False, **settings
    )
    return ids if ids[0] == theirs.bos_token_id else [theirs.bos_token_id, *ids]


def said(tokenizer, rendered):
    """The text of each run of answer tokens, special tokens too."""
    model = tokenizer.as_bpe() if isinstance(tokenizer, ByteTokenizer) else tokenizer.model
    edges = np.flatnonzero(np.diff([0, *rendered.answers.astype(int), 0]))
    return [
        model.decode(rendered.ids[start:stop].tolist(), skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]


CHATS = [
    talk("Hello, how are you?", "Fine, thé fox 👩 jumps. ", "  lazy\n", "dog"),
    talk("Hi", "the\n\nanswer\n"),
    talk("Hello", "over", system=" Be quick.\n"),
    talk("1", "2", "3\n\n", "4  ", "5", "[INST] 6", system="<<SYS>>"),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_answers_are_those_of_transformers(any_folder, template, tmp_path):
    theirs, ours = theirs_of(any_folder), ours_of(any_folder, template, tmp_path)
    for chat in CHATS:
        if template in NO_SYSTEM and chat.messages[0].role == "system":
            continue
        found = ours.render(chat)
        assert found.ids.tolist() == reference(theirs, source(template), chat)
        assert (
            found.ids.tolist().count(1) == (template == "llama2" and len(chat.messages) // 2) or 1
        )
        masked = theirs.apply_chat_template(
            dicts(chat),
            chat_template=source(f"{template}_generation"),
            return_assistant_tokens_mask=True,
        )
        behind = len(masked["input_ids"])
        assert found.ids[-behind:].tolist() == masked["input_ids"]
        assert found.answers[-behind:].tolist() == [bool(a) for a in masked["assistant_masks"]]
        assert not found.answers[: len(found.ids) - behind].any()


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_any_text_are_those_of_transformers(folder, template, tmp_path):
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    texts = [text for text in random_texts(200) if "\0" not in text and text.strip()]
    draw = random.Random(0)
    for _ in range(50):
        turns = [draw.choice([" ", "\n", ""]) + text for text in draw.sample(texts, 4)]
        chat = talk(*turns)
        found = ours.render(chat)
        assert found.ids.tolist() == reference(theirs, source(template), chat)


BYTE_LEVEL = {
    "llama2": [" Fine. </s>", " the dog </s>"],
    "llama3": ["Fine.<|eot_id|>", "the dog<|eot_id|>"],
    "chatml": ["Fine. <|im_end|>", "the dog<|im_end|>"],
    "mistral": ["Fine. </s>", "the dog</s>"],
    "zephyr": ["Fine. </s>", "the dog</s>"],
    "gemma": ["Fine.<end_of_turn>", "the dog<end_of_turn>"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistant_says_its_answers_and_the_end_of_turn(folder, template, tmp_path):
    ours = ours_of(folder, template, tmp_path)
    found = ours.render(talk("Hello\n", "Fine. ", "Who?", "the dog"))
    assert said(ours.tokenizer, found) == BYTE_LEVEL[template]
    assert found.ids[0] == 1
    assert not found.answers[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_not_to_learn_is_read_and_not_said(folder, template, tmp_path):
    ours = ours_of(folder, template, tmp_path)
    chat = talk("Hello\n", "Fine. ", "Who?", "the dog")
    whole = ours.render(chat)
    turns = list(chat.messages)
    turns[1] = turns[1]._replace(learnt=False)
    found = ours.render(chat._replace(messages=tuple(turns)))
    assert found.ids.tolist() == whole.ids.tolist()
    assert said(ours.tokenizer, found) == BYTE_LEVEL[template][1:]


def test_by_hand(folder, tmp_path):
    ours = ours_of(folder, "chatml", tmp_path)
    found = ours.render(talk("Hi", "a"))
    model = ours.tokenizer.model
    tokens = [model.id_to_token(number) for number in found.ids]
    expected = "<s> <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ a <|im_end|> Ċ"
    assert "".join(tokens) == expected.replace(" ", "")
    answers = [token for token, answer in zip(tokens, found.answers, strict=True) if answer]
    assert answers == ["a", "<|im_end|>"]
    assert found.document is None


FORGERIES = [*SPECIALS[1:5], *SPECIALS[-2:], "<|im_end|>\n<|im_start|>user", "<|im_end|", "\\0"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_message_forges_a_special_token(any_folder, template, tmp_path):
    ours = ours_of(any_folder, template, tmp_path)
    plain = ours.render(talk("a", "the a", "b", "c")).ids
    for special in FORGERIES:
        forged = f"x{special}y{special}{special}z"
        found = ours.render(talk(forged, "the " + forged, "b", forged)).ids
        expected = [i for i in plain if 0 < i < len(SPECIALS)]
        assert [i for i in found if 0 < i < len(SPECIALS)] == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_forged_text_is_what_transformers_reads_when_told_to(folder, template, tmp_path):
    """They cut the text where something is forged; here the pre-tokenizer cuts there anyway."""
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    for special in FORGERIES:
        forged = f"x{special}y{special}{special}z"
        chat = talk(forged, "the " + forged, "b", forged)
        found = ours.render(chat)
        clean = reference(theirs, source(template), chat, sanitize_control_tokens=True)
        assert found.ids.tolist() == clean
        first, second = said(ours.tokenizer, found)
        assert first.strip().startswith("the " + forged)
        assert second.strip().startswith(forged)


def test_forged_text_is_read_as_the_tokenizer_reads_text(folder, tmp_path):
    ours = ours_of(folder, "chatml", tmp_path)
    text = "see <|im_end|> and </s> there"
    found = ours.render(talk("a", text)).ids.tolist()
    alone = ours.tokenizer.encode([text])[0].tolist()
    assert found[-2 - len(alone) : -2] == alone


def test_other_added_tokens_are_text_only_where_the_template_writes_them(tmp_path):
    model = trained("byte-level")
    model.add_tokens([AddedToken("<|turn|>"), AddedToken("<think>"), AddedToken("\n\n")])
    template = (
        "{% for m in messages %}<|turn|>{{ m['role'] + '\n\n' + m['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n\n{% endif %}"
    )
    folder = write(tmp_path / "more", model)
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    turn, think, lines = (model.token_to_id(t) for t in ("<|turn|>", "<think>", "\n\n"))
    found = ours.render(talk("a<|turn|>b\n\nc", "<think>d<|turn|>")).ids.tolist()
    assert [found.count(i) for i in (turn, think, lines)] == [2, 1, 3]
    chat = talk("a\n\nb", "<think> c")
    assert ours.render(chat).ids.tolist() == reference(theirs, template, chat)


def test_bos_and_eos_are_special_even_where_the_file_does_not_say_so(folder, tmp_path):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["added_tokens"] = found["added_tokens"][:1]
    kept = write(tmp_path / "plain", tokenizers.Tokenizer.from_str(json.dumps(found)))
    theirs, ours = theirs_of(kept), ours_of(kept, "llama2", tmp_path)
    for chat in CHATS:
        assert ours.render(chat).ids.tolist() == reference(theirs, source("llama2"), chat)


@pytest.mark.parametrize("setting", ["normalized", "single_word"])
def test_a_special_token_that_is_not_always_found_is_refused(tmp_path, setting):
    model = trained("prepend")  # which looks for ▁<|x|>, if normalized
    model.add_special_tokens([AddedToken("<|x|>", special=True, **{setting: True})])
    folder = write(tmp_path / "odd", model)
    with pytest.raises(ValueError, match=r"'<\|x\|>' is read as text beside other text; set its"):
        ours_of(folder, "chatml", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"rstrip": True}, {"lstrip": True}, {"normalized": True}, {"rstrip": True, "lstrip": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["byte-level", "first"])
def test_special_tokens_may_take_space_with_them(tmp_path, kind, settings):
    model = trained(kind)
    model.add_special_tokens([AddedToken("<|end|>", special=True, **settings)])
    template = source("chatml").replace("<|im_end|>", "<|end|>")
    folder = write(tmp_path / "strip", model)
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    for chat in CHATS:
        assert ours.render(chat).ids.tolist() == reference(theirs, template, chat)


def test_a_token_belongs_to_where_its_first_character_is(tmp_path):
    ours = ours_of(write(tmp_path / "first", trained("first")), "chatml", tmp_path)
    lines = ours.tokenizer.model.token_to_id("\n\n")
    found = ours.render(talk("a", "\nb"))
    at = found.ids.tolist().index(lines)
    answer = [ours.tokenizer.model.id_to_token(i) for i in found.ids[found.answers]]
    assert not found.answers[at]
    assert answer == ["b", "<|im_end|>"]


def test_space_before_an_answer_is_its_own_if_the_prompt_ends_before_it(folder, tmp_path):
    """As for Llama 2; where the prompt for generation has the space, the model need not say it."""
    written = "{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] + eos_token }}{% endfor %}"
    prompts = {"[assistant]:": " Yes</s>", "[assistant]: ": "Yes</s>", "": "Yes</s>"}
    for prompt, answer in prompts.items():
        asked = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
        ours = ours_of(folder, written + asked, tmp_path)
        found = ours.render(talk("a", "Yes"))
        expected = answer if prompt != "[assistant]: " else "</s>"  # " Yes" begins before it
        straddles = "ĠYes" in ours.tokenizer.model.get_vocab()
        assert said(ours.tokenizer, found) == [expected if straddles else answer]


def test_offsets_are_not_trimmed(folder, tmp_path):
    """GPT-2's post-processor says that " Yes" begins at Y, in the answer."""
    model = trained("byte-level")
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = write(tmp_path / "trimmed", model)
    template = (
        source("chatml").replace("+ '\\n' + m", "+ ': ' + m").replace("assistant\\n", "assistant: ")
    )
    found = [ours_of(f, template, tmp_path).render(talk("a", "the")) for f in (folder, trimmed)]
    assert found[0].answers.tolist() == found[1].answers.tolist()
    assert found[0].answers.sum() == 2  # " the", whose space is the template's, and <|im_end|>


def test_the_longest_special_token_wins(tmp_path):
    model = trained("byte-level")
    model.add_special_tokens(["<|im_end|>!"])
    folder = write(tmp_path / "long", model)
    template = source("chatml").replace("<|im_end|>", "<|im_end|>!")
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    for chat in CHATS:
        assert ours.render(chat).ids.tolist() == reference(theirs, template, chat)


def test_without_an_end_of_turn_the_last_answer_ends_with_eos(folder, tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    ours = ours_of(folder, template, tmp_path)
    found = ours.render(talk("a", "b", "c", "d"))
    assert [text.strip() for text in said(ours.tokenizer, found)] == ["b", "d\n</s>"]
    assert found.ids[0] == 1
    assert found.ids[-1] == 2
    assert found.ids.tolist().count(2) == 1


def test_bos_does_not_end_a_turn(folder, tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}{% endif %}"
        "{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    )
    ours = ours_of(folder, template, tmp_path)
    found = ours.render(talk("a", "b", "c", "d"))
    assert not found.answers[found.ids == 1].any()
    assert said(ours.tokenizer, found) == ["b", "d\n</s>"]


def test_eos_ends_a_turn_where_it_is_bos_too(tmp_path):
    folder = write(tmp_path / "one", trained("byte-level"), bos_token="</s>")
    for template, space in (("zephyr", ""), ("llama2", " ")):
        ours = ours_of(folder, template, tmp_path)
        answers = said(ours.tokenizer, ours.render(talk("a", "b", "c", "d")))
        assert answers == [f"{space}{letter}{space}</s>" for letter in "bd"]


# ---- where the template is


def test_the_template_is_the_tokenizers_own(tmp_path):
    chat = talk("Hi", "Yes")
    folder = write(tmp_path / "own", trained("byte-level"), chat_template=source("chatml"))
    theirs = theirs_of(folder)
    ours = ChatTemplate(open_tokenizer(str(folder)))
    assert ours.source == source("chatml")
    assert ours.render(chat).ids.tolist() == reference(theirs, None, chat)

    (folder / "chat_template.jinja").write_text(source("zephyr"))
    theirs = theirs_of(folder)
    assert ChatTemplate(open_tokenizer(str(folder))).source == theirs.chat_template
    assert theirs.chat_template == source("zephyr")


def test_of_several_templates_the_default_one(tmp_path):
    several = [{"name": name, "template": source(name)} for name in ("llama2", "gemma")]
    several.append({"name": "default", "template": source("chatml")})
    folder = write(tmp_path / "own", trained("byte-level"), chat_template=several)
    assert ChatTemplate(open_tokenizer(str(folder))).source == source("chatml")
    folder = write(tmp_path / "own", trained("byte-level"), chat_template=several[:2])
    with pytest.raises(ValueError, match=r"own has no chat template; expected .* or 'plain'$"):
        ChatTemplate(open_tokenizer(str(folder)))


def test_templates_know_the_special_tokens_of_the_config(tmp_path):
    extra = {
        "pad_token": {"content": "<|eot_id|>", "__type": "AddedToken"},
        "add_bos_token": True,
        "sep_token": None,
    }
    template = (
        "{{ bos_token }}{{ pad_token }}{{ unk_token }}{% if sep_token is defined %}!{% endif %}"
        "{% if add_bos_token is defined %}?{% endif %}{% if tools is none %}n{% endif %}"
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    folder = write(tmp_path / "own", trained("byte-level"), chat_template=template, **extra)
    theirs, chat = theirs_of(folder), talk("Hi", "Yes")
    ours = ChatTemplate(open_tokenizer(str(folder)))
    assert ours.render(chat).ids.tolist() == reference(theirs, None, chat)


def test_the_sandbox_renders_as_that_of_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = """
    {%- set state = namespace(seen=0) %}
    {%- for m in messages %}
        {%- if m.role == 'skip' %}{% continue %}{% endif %}
        {%- set state.seen = state.seen + 1 %}
        {{ m | tojson }} {{ m | tojson(indent=2) }} {{ strftime_now('%Y') }}
        {% generation %}
        {{ m.content | trim }}
        {%- endgeneration %}
        {% if state.seen > 1 %}{% break %}{% endif %}
    {% endfor %}
    """
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", " <é>&'\" "), ("skip", "b"), ("a", "c"), ("d", "e")]
    ]
    before = datetime.now().year
    found = compiled(template).render(messages=messages)
    expected, _ = utils.render_jinja_template([messages], chat_template=template)
    assert found == expected[0]
    assert any(str(year) in found for year in (before, datetime.now().year))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", r"Unexpected end of template"),
        ("{{ messages[0].content }}", r"drops, repeats or rewrites a message"),
        ("{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}", r"drops, repeats or"),
        ("{{ messages | tojson }}", r"drops, repeats or rewrites a message"),
        ("{{ messages }}", r"drops, repeats or rewrites a message"),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            r"depends on what a message says",
        ),
        (
            "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
            r"depends on what a message says",
        ),
        ("{{ raise_exception('never\nagain') }}", r"fails: never again"),
        ("{{ messages[7].content }}", r"fails: .*has no element 7"),
        ("{{ ''.__class__.__mro__ }}", r"fails: access to attribute '__class__'.* is unsafe"),
        ("{% set _ = messages.append(1) %}", r"fails: .*is not safely callable|unsafe"),
        ("{{ 1 / 0 }}", r"fails: division by zero"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(folder, tmp_path, template, reason):
    with pytest.raises(ValueError, match=reason) as found:
        ours_of(folder, template, tmp_path)
    assert "\n" not in str(found.value)
    assert str(found.value).startswith(f"{tmp_path}/template.jinja cannot be trained on: ")
    assert not isinstance(found.value, Malformed)


GREEDY = {
    "seconds": [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 9) }}",
    ],
    "memory": [
        "{{ 'a' * 3000000000 }}",
        "{% set n = namespace(x='a') %}"
        "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ messages[0].content.ljust(3000000000) }}",
    ],
    "characters": ["{{ 'a' * 9000000 }}"],
}


@pytest.mark.parametrize(("limit", "template"), [(k, t) for k, ts in GREEDY.items() for t in ts])
def test_a_template_has_no_more_than_its_share(folder, tmp_path, monkeypatch, limit, template):
    """Of processor time, memory and text; the process that asks has none of it on its account."""
    monkeypatch.setattr(template_process, "SECONDS", 0.3 if limit == "seconds" else 60.0)
    monkeypatch.setattr(template_process, "MEMORY", 2**28 if limit == "characters" else 2**26)
    before = resource.getrusage(resource.RUSAGE_SELF)
    said = rf"^{tmp_path}/template.jinja was stopped: it needs more than [\d.,]+ .*{limit}"
    with pytest.raises(ValueError, match=said) as found:
        ours_of(folder, template, tmp_path)
    assert not isinstance(found.value, Malformed)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 400 * 1024  # KiB; the strings would be 3 GB
    # the next template is served by a new process
    assert ours_of(folder, "chatml", tmp_path).render(talk("Hi", "Yes")).answers.any()


def test_a_greedy_conversation_stops_prepare_at_once(folder, tmp_path, monkeypatch, capfd):
    """It is not one broken row of many: each would cost the limit."""
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    greedy = "{% for m in messages %}{{ m.content }}" + (
        "{% if 'slow' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    )
    (tmp_path / "template.jinja").write_text(greedy)
    rows = [{"instruction": f"slow {i}" if i > 9 else "fast", "output": "x"} for i in range(999)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"input": "rows.jsonl", "chat_template": "template.jinja", "output": "out"}
    given = [word for key, name in arguments.items() for word in (f"--{key}", tmp_path / name)]
    given += ["--tokenizer", folder, "--chat", "true"]
    assert cli.main(["prepare", *map(str, given)]) == 1
    assert "template.jinja was stopped: it needs more than 0.3" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_template_that_cannot_be_found_is_refused(folder, tmp_path):
    coder = open_tokenizer(str(folder))
    with pytest.raises(ValueError, match=r"has no chat template; expected .* or 'plain'$"):
        ChatTemplate(coder)
    with pytest.raises(ValueError, match=r"expected a Jinja template in .*missing; got "):
        ChatTemplate(coder, str(tmp_path / "missing"))


def test_conversations_that_a_template_does_not_show_are_malformed(folder, tmp_path):
    system = talk("Hi", "Yes", system="Be kind.")
    with pytest.raises(Malformed, match=r"fails: System role not supported$"):
        ours_of(folder, "gemma", tmp_path).render(system)
    silent = (
        "{% for m in messages if m.role != 'system' %}{{ m.role ~ ':' ~ m.content }}{% endfor %}"
    )
    ours = ours_of(folder, silent, tmp_path)
    assert ours.render(talk("Hi", "Yes")).answers.any()
    with pytest.raises(Malformed, match=r"drops, repeats or rewrites a message$"):
        ours.render(system)
    # as Qwen 3 does with what was thought
    thinks = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    ours = ours_of(folder, thinks, tmp_path)
    assert ours.render(talk("Hi", "Yes")).answers.any()
    with pytest.raises(Malformed, match=r"depends on what a message says$"):
        ours.render(talk("Hi", "Oh.</think>Yes"))
    for place in ("{0}{1}", "{1}{0}"):
        secret = "{{ 'secret' if 'x' in messages[0].content else 'public' }}"
        template = place.format(secret, source("llama3"))
        ours = ours_of(folder, template, tmp_path)
        assert ours.render(talk("Hi", "Yes")).answers.any()
        with pytest.raises(Malformed, match=r"depends on what a message says$"):
            ours.render(talk("x", "Yes"))
    ours = ours_of(
        folder, source("llama3") + "{% if 'x' in messages[0].content %}!{% endif %}", tmp_path
    )
    with pytest.raises(Malformed, match=r"depends on what a message says$"):
        ours.render(talk("x", "Yes"))
    with pytest.raises(Malformed, match="NUL in text"):
        ours.render(talk("Hi \x001\0", "Yes"))


def test_a_default_system_prompt_is_the_templates(folder, tmp_path):
    default = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    )
    template = default + source("chatml")
    theirs, ours = theirs_of(folder), ours_of(folder, template, tmp_path)
    for chat in CHATS:
        assert ours.render(chat).ids.tolist() == reference(theirs, template, chat)


# ---- other tokenizers


def test_bytes_speak_plainly(tmp_path):
    coder = ByteTokenizer()
    ours = ChatTemplate(coder)
    chat = talk("Hé <eos>", " Yes\n", "a", "b", system="Be")
    found = ours.render(chat)
    parts = [256, "<|system|>\nBe", 257, "\n<|user|>\nHé <eos>", 257, "\n<|assistant|>\n"]
    parts += [" Yes\n", 257, "\n<|user|>\na", 257, "\n<|assistant|>\n", "b", 257, "\n"]
    by_hand = [[p] if isinstance(p, int) else list(p.encode()) for p in parts]
    assert found.ids.tolist() == list(chain(*by_hand))
    expected = [part in (6, 7, 11, 12) for part, ids in enumerate(by_hand) for _ in ids]
    assert found.answers.tolist() == expected

    coder.save(tmp_path)
    theirs, plain = theirs_of(tmp_path), talk("Hé", " Yes\n")
    assert ours.render(plain).ids.tolist() == reference(theirs, ours.source, plain)


def test_any_tokenizer_speaks_plainly(any_folder):
    theirs = theirs_of(any_folder)
    ours = ChatTemplate(open_tokenizer(str(any_folder)), "plain")
    for chat in CHATS:
        assert ours.render(chat).ids.tolist() == reference(theirs, ours.source, chat)


def sentencepiece_model(kind, **settings):
    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    out = io.BytesIO()
    pytest.importorskip("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=out,
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"byte_fallback": True, **lossless, **settings},
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    return folder


@pytest.mark.parametrize("template", ["llama2", "mistral", "zephyr"])
def test_sentencepiece_speaks_as_in_transformers(piece_folder, template, tmp_path):
    ours = ours_of(piece_folder, template, tmp_path)
    ours.tokenizer.save(tmp_path)
    theirs = theirs_of(tmp_path)
    for chat in CHATS:
        if template in NO_SYSTEM and chat.messages[0].role == "system":
            continue
        found = ours.render(chat)
        assert found.ids.tolist() == reference(theirs, source(template), chat)
        masked = theirs.apply_chat_template(
            dicts(chat),
            chat_template=source(f"{template}_generation"),
            return_assistant_tokens_mask=True,
        )
        behind = len(masked["input_ids"])
        assert found.answers[-behind:].tolist() == [bool(a) for a in masked["assistant_masks"]]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_message_forges_control_symbols_of_sentencepiece(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(kind))
    ours = ours_of(tmp_path, "zephyr", tmp_path)
    found = ours.render(talk("a</s><s>b", "c</s>d"))
    assert [i for i in found.ids if i in (1, 2)] == [1, 2, 2]
    model = ours.tokenizer.model
    assert model.decode(found.ids[found.answers].tolist()).strip() == "c</s>d"


def test_added_tokens_that_a_sentencepiece_model_has_not_are_refused(piece_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((piece_folder / "tokenizer.model").read_bytes())
    added = {"7000": {"content": "<|im_end|>"}, "7001": {"content": "<|x|>"}}
    added["5"] = {"content": "[INST]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=r"has no token '<\|im_end\|>', which the chat template"):
        ours_of(tmp_path, "chatml", tmp_path)
    assert ours_of(tmp_path, "llama2", tmp_path).render(talk("a", "b")).answers.any()


def test_bos_of_sentencepiece_need_not_be_a_control_symbol(tmp_path):
    model = sentencepiece_model("bpe", user_defined_symbols=["<|b|>"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|b|>"}))
    ours = ours_of(tmp_path, "mistral", tmp_path)
    found = ours.render(talk("a", "b")).ids.tolist()
    assert found[0] == ours.tokenizer.bos == 3
    assert found.count(3) == 1


def test_a_sentencepiece_model_without_bytes_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=False))
    with pytest.raises(ValueError, match=r"tokenizer\.model has no byte fallback; save it as"):
        ours_of(tmp_path, "llama2", tmp_path)


# ---- documents


def asked(document):
    row = {"document": document, "question": "the fox?", "answer": "the dog jumps"}
    return conversation(row, "name", "source")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("document", ["the lazy dog. " * 30, " \n" + "thé 👩 fox\n" * 30 + "\n\n"])
def test_the_document_is_known_to_the_token(folder, template, document, tmp_path):
    ours = ours_of(folder, template, tmp_path)
    whole = ours.render(asked(document))
    decode = ours.tokenizer.model.decode
    start, stop = whole.document
    inside = decode(whole.ids[start:stop].tolist())
    assert document.strip().endswith(inside.strip())
    assert len(inside.strip()) >= len(document.strip()) - len("the ")  # " the" may begin before it
    assert decode(whole.ids[stop:].tolist()).startswith("\n\nthe fox?")


def test_the_document_is_known_behind_a_system_prompt(folder, tmp_path):
    ours = ours_of(folder, "chatml", tmp_path)
    row = {"system": "the dog", "document": "the lazy dog. " * 3, "question": "?", "answer": "!"}
    whole = ours.render(conversation(row, "name", "source"))
    inside = ours.tokenizer.model.decode(whole.ids[slice(*whole.document)].tolist())
    assert inside.strip() == row["document"].strip()


def test_a_token_that_reaches_beyond_the_document_is_never_cut(tmp_path):
    ours = ours_of(write(tmp_path / "first", trained("first")), "chatml", tmp_path)
    whole = ours.render(asked("the fox\n"))
    start, stop = whole.document
    tokens = [ours.tokenizer.model.id_to_token(i) for i in whole.ids]
    assert "".join(tokens[start:stop]) == "the▁fox"
    assert tokens[stop : stop + 2] == ["\n\n", "\n"]


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_the_template_knows_what_ends_a_turn(folder, template, end, tmp_path):
    ours = ours_of(folder, template, tmp_path)
    assert ours.end_of_turn == ours.tokenizer.model.token_to_id(end)
