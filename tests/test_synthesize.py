"""Against a server of the chat-completions protocol that fails as servers do, on loopback."""

import hashlib
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_longctx import cli
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.making import generators, synthesize
from lit_longctx.data.making.generators import Checkpoint, Endpoint
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.making.report import Unanswered
from lit_longctx.data.making.self_instruct import Reply
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import generate
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

pytest.importorskip("openai")

KEY = "sk-very-secret-9f3b"
TIMEOUT = 60.0
"""Seconds that a client waits: more than a busy machine may need for any reply that comes."""


# ---- the server


class Asked(NamedTuple):
    """A request as the server saw it."""

    prompt: str
    document: int
    seed: int
    key: str
    at: float


def question_or_verdict(prompt):
    """Reply as a good model would; what it says depends on the prompt alone."""
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    if "Proposed answer:" in prompt:
        return f"Reason {mark}. <verdict>yes</verdict>"
    town = re.search(r"town\d+x", prompt)  # half of the answer's words must be the document's
    answer = f"It is {mark} of {town[0]}." if town else f"It is {mark}."
    return f"<question>What is {mark}?</question><answer>{answer}</answer>"


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default, 5, some of many clients wait a second to connect


class Server:
    """Logs what it is asked; `act` says what is wrong with the n-th try of a prompt, if anything.

    It may return the text to say, a status (with headers), a body, or None to say nothing at all.
    `hold` is called before a reply, with the number of the request, and may wait for something.
    """

    def __init__(self):
        self.log, self.busy, self.most = [], 0, 0
        self.lock, self.end = threading.Lock(), threading.Event()
        self.hold = lambda number: None
        self.act = lambda asked, attempt: question_or_verdict(asked.prompt)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                pass

        self.http = Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.end.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        (message,) = body["messages"]
        number = re.search(r"town(\d+)x", message["content"])
        asked = Asked(
            message["content"],
            int(number[1]) if number else -1,
            body["seed"],
            request.headers["Authorization"],
            time.monotonic(),
        )
        with self.lock:
            self.log.append(asked)
            number = len(self.log)
            self.busy += 1
            self.most = max(self.most, self.busy)
        # by the client, as of two tries that were given up the later one may come first
        attempt = 1 + int(request.headers["x-stainless-retry-count"])
        found = self.act(asked, attempt)
        self.hold(number)
        with self.lock:  # before the reply, after which the client may ask again
            self.busy -= 1
        self.respond(request, asked, found)

    def respond(self, request, asked, found):
        status, headers = 200, {}
        if found is None:
            self.end.wait()
            return
        if isinstance(found, tuple):
            status, headers, body = found
        else:
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            choice = {"message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": usage})
        try:
            request.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body.encode())
        except OSError:  # the client was killed
            pass

    def times(self, document):
        """When each request about a document came."""
        return [asked.at for asked in self.log if asked.document == document]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = Server()
    yield found
    found.close()


def documents(folder, number):
    """Write documents, long enough to choose a chunk from; each chunk knows its document."""
    path = folder / "documents.jsonl"
    rows = [
        {"id": f"d{i}", "text": " ".join(f"town{i}x has gate {j}." for j in range(200))}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(server, given, output, **options):
    """Flags of the verb; `options` are the endpoint's, or the task's where it has such."""
    flags = {
        "--task": "SelfInstruct",
        "--task.input": str(given),
        "--task.chunk": 300,
        "--task.shortest": 1000,
        "--task.generator": "Endpoint",
        "--task.generator.base_url": server.url,
        "--task.generator.model": "parrot",
        "--task.generator.max_retries": 1,
        "--task.generator.timeout": TIMEOUT,
        "--output": str(output),
    }
    task = ("tolerated", "questions", "shortest")
    for name, value in options.items():
        flags[f"--task.{name}" if name in task else f"--task.generator.{name}"] = value
    return [str(part) for pair in flags.items() for part in pair]


def run(*flags):
    cli.call(synthesize.synthesize, "synthesize", list(flags))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_vain(monkeypatch, hopeless):
    """Let the client wait but for a moment for replies to prompts that will have none.

    So no time limit is so short that a reply that does come could miss it.
    """
    wait_for_turn = Endpoint._wait_for_turn

    def hook(endpoint, request):
        wait_for_turn(endpoint, request)
        assert request.extensions["timeout"]["read"] == TIMEOUT
        prompt = json.loads(request.content)["messages"][0]["content"]
        if hopeless(prompt, 1 + int(request.headers["x-stainless-retry-count"])):
            request.extensions["timeout"] = {**request.extensions["timeout"], "read": 0.05}

    monkeypatch.setattr(Endpoint, "_wait_for_turn", hook)


def eventually(condition):
    """Wait until something holds; a test that waits in vain fails by pytest's time limit."""
    while not condition():
        time.sleep(0.002)


# ---- faults


@pytest.mark.slow
def test_every_fault_is_made_good_or_counted_under_its_name(server, tmp_path, capsys, monkeypatch):
    acts = {
        0: lambda n: "once" if n > 1 else (500, {}, "{}"),
        1: lambda n: (500, {}, "overloaded"),
        2: lambda n: "once" if n > 1 else None,
        3: lambda n: None,
        4: lambda n: (200, {}, '{"choices": [{"mess'),
        5: lambda n: (200, {}, '{"choices": []}'),
        6: lambda n: "once" if n > 1 else (429, {"Retry-After": "1.2"}, "{}"),
        7: lambda n: "I would rather not.",
        8: lambda n: "",
        9: lambda n: "<question>Who?</question><answer></answer>",
        10: lambda n: (400, {}, json.dumps({"error": {"message": "too long for me"}})),
        11: lambda n: (200, {"Content-Type": "text/html"}, "<html>proxy</html>"),
        12: lambda n: (200, {}, '["no object"]'),
    }
    critiques = {13: "It is wrong. <verdict>no</verdict>", 14: "Hard to say."}

    def act(asked, attempt):
        is_critique = "Proposed answer:" in asked.prompt
        if is_critique and asked.document in critiques:
            return critiques[asked.document]
        found = "once"
        if not is_critique and asked.document in acts:
            found = acts[asked.document](attempt)
        return question_or_verdict(asked.prompt) if found == "once" else found

    def never_answered(prompt, attempt):
        return "Proposed answer:" not in prompt and (
            "town3x" in prompt or ("town2x" in prompt and attempt == 1)
        )

    server.act = act
    in_vain(monkeypatch, never_answered)
    output = tmp_path / "x.jsonl"
    run(*arguments(server, documents(tmp_path, 17), output, tolerated=0.9, concurrency=17))
    assert [row["id"] for row in rows_of(output)] == ["d0#0", "d2#0", "d6#0", "d15#0", "d16#0"]
    expected = [3, 2, 3, 2, 1, 1, 3, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    # requests that the client no longer waits for may reach the server last
    eventually(lambda: len(server.log) >= sum(expected))
    assert [len(server.times(i)) for i in range(17)] == expected
    first, second, _ = server.times(6)
    # at least what Retry-After says, and not the client's own 0.5 s; a slow machine adds to it only
    assert second - first >= 1.2
    shown = capsys.readouterr().out
    assert "17 documents: 5 rows kept, 1 filtered by critique, 11 failed" in shown
    found = {reason: int(n) for n, reason in re.findall(r"failed (\d+): ([^,]+), first", shown)}
    assert found == {
        "HTTP 500": 1,
        "timeout": 1,
        "broken JSON": 2,
        "no choices": 2,
        "no question and answer in the reply": 1,
        "empty reply": 1,
        "empty question or answer": 1,
        "HTTP 400": 1,
        "no verdict in the critique": 1,
    }
    assert "first d10#0: Error code: 400" in shown
    assert "too long for me" in shown
    # 10 questions were answered with 200 and a text, and 7 of them had a critique
    answered = 5 + 3 + 2 + 7
    assert f"  {answered} replies of this run, 0 replies of earlier runs, " in shown
    assert f"{100 * answered:,} prompt tokens, {10 * answered} new tokens" in shown
    assert f", {sum(expected)} requests" in shown
    assert f"wrote {output}" in shown


def test_a_connection_that_breaks_off_is_tried_again(server, tmp_path, monkeypatch):
    def broken(request, asked, found):
        linger = struct.pack("ii", 1, 0)  # close with a reset
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.connection.close()

    monkeypatch.setattr(server, "respond", broken)
    with pytest.raises(Unanswered, match=r"^no connection$"):
        Endpoint(server.url, "parrot", max_retries=1).complete("hello", 0)
    assert len(server.log) == 2


def test_too_many_failures_stop_and_what_was_replied_is_not_asked_again(server, tmp_path, capsys):
    given, output = documents(tmp_path, 40), tmp_path / "x.jsonl"
    server.act = lambda asked, _: (
        (503, {}, "{}") if asked.document % 2 else question_or_verdict(asked.prompt)
    )
    options = {"concurrency": 2, "max_retries": 0}
    with pytest.raises(ValueError, match=r"^10 of 20 questions failed .* by HTTP 503 \(10, first"):
        run(*arguments(server, given, output, **options))
    assert [path.name for path in tmp_path.iterdir() if path != given] == ["x.jsonl.asked"]
    asked = len(server.log)
    assert asked < 60  # it did not go on to the end
    server.act = lambda asked, _: question_or_verdict(asked.prompt)
    run(*arguments(server, given, output, **options))
    assert [row["id"] for row in rows_of(output)] == [f"d{i}#0" for i in range(40)]
    again = [asked for asked in server.log if not asked.document % 2]
    assert len(again) == len({asked.prompt for asked in again}) == 40
    assert "40 rows kept, 0 filtered by critique, 0 failed" in capsys.readouterr().out


def test_of_few_questions_too_many_may_not_fail_either(server, tmp_path):
    server.act = lambda asked, _: "nothing" if asked.document else question_or_verdict(asked.prompt)
    with pytest.raises(ValueError, match=r"^2 of 3 questions failed \(tolerated: 10\.0%\)"):
        run(*arguments(server, documents(tmp_path, 3), tmp_path / "x.jsonl"))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_everything_stops_at_once(server, tmp_path, status):
    server.act = lambda asked, _: (status, {}, json.dumps({"error": {"message": KEY}}))
    message = (
        rf"^http://127\.0\.0\.1:\d+/v1 refuses with HTTP {status}; check address, model parrot and "
        "the key in OPENAI_API_KEY$"
    )
    with pytest.raises(ValueError, match=message):
        run(*arguments(server, documents(tmp_path, 20), tmp_path / "x.jsonl", concurrency=1))
    assert len(server.log) == 1


# ---- bounds


def test_no_more_requests_at_a_time_than_allowed(server, tmp_path):
    # a reply waits for two others, so that three at a time are seen; each question makes two
    three = threading.Barrier(3, timeout=TIMEOUT)
    server.hold = lambda number: three.wait()
    given, output = documents(tmp_path, 9), tmp_path / "x.jsonl"
    run(*arguments(server, given, output, concurrency=3, questions=2))
    assert server.most == 3
    assert len(server.log) == 36
    assert len(rows_of(output)) == 18
    assert len({row["chunk"][0] for row in rows_of(output)}) > 12


def test_requests_are_spread_over_the_minute_and_retries_with_them(server, tmp_path, monkeypatch):
    """The clock stands still, so that pauses are as long as the requests before them want."""
    pauses, unpaused = [], []
    monkeypatch.setattr(
        generators, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=pauses.append)
    )
    server.hold = lambda number: unpaused.extend([number] * (number > len(pauses)))
    server.act = lambda asked, attempt: (
        (500, {"Retry-After": "0.01"}, "{}") if attempt == 1 else question_or_verdict(asked.prompt)
    )
    given = documents(tmp_path, 5)
    limits = {"concurrency": 8, "requests_per_minute": 1200}
    run(*arguments(server, given, tmp_path / "x.jsonl", **limits))
    assert len(server.log) == 20
    assert sorted(pauses) == pytest.approx([0.05 * i for i in range(20)])
    assert unpaused == []  # every request came after a pause


def test_time_without_requests_is_not_made_up_for(server, monkeypatch):
    clock, pauses = [100.0], []
    monkeypatch.setattr(
        generators, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=pauses.append)
    )
    model = Endpoint(server.url, "parrot", requests_per_minute=60)
    for clock[0] in (100.0, 100.25, 500.0, 500.0, 500.0):
        model.complete("hello", 0)
    assert pauses == [0, 0.75, 0, 1, 2]


# ---- kill and resume

IN_FLIGHT = 4


def over(process):
    return process.poll() is not None


def killed_while(server, flags, replies):
    """Run the verb in a process of its own; kill it when so many replies were all it got.

    The requests after them are in flight then, as many as the verb may make at a time.
    """
    begun, dead = len(server.log), threading.Event()
    server.hold = lambda number: number <= begun + replies or dead.wait()
    code = (
        "import sys; from lit_longctx import cli; "
        "from lit_longctx.data.making import synthesize; "  # it must find Endpoint by itself
        "cli.call(synthesize.synthesize, 'synthesize', sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.DEVNULL)
    try:
        eventually(
            lambda: len(server.log) == begun + replies + IN_FLIGHT or process.poll() is not None
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        dead.set()
        server.hold = lambda number: None


@pytest.mark.slow
def test_after_a_kill_nothing_is_asked_twice_but_what_was_in_flight(server, tmp_path):
    given, options = documents(tmp_path, 30), {"concurrency": IN_FLIGHT, "tolerated": 0.0}
    whole, resumed = tmp_path / "whole" / "x.jsonl", tmp_path / "resumed" / "x.jsonl"
    run(*arguments(server, given, whole, **options))
    once = Counter(asked.prompt for asked in server.log)
    seeds = {asked.prompt: asked.seed for asked in server.log}
    assert len(once) == len(set(seeds.values())) == 60
    assert set(once.values()) == {1}
    server.log.clear()
    killed_while(server, arguments(server, given, resumed, **options), 25)
    kept = (resumed.parent / "x.jsonl.asked").read_bytes()
    assert not resumed.exists()
    assert kept.count(b"\n") == 25  # a thread keeps its reply before it asks again
    run(*arguments(server, given, resumed, **options))
    twice = Counter(asked.prompt for asked in server.log)
    assert set(twice) == set(once)
    assert sum(twice.values()) - len(twice) == IN_FLIGHT
    assert max(twice.values()) <= 2
    assert {asked.prompt: asked.seed for asked in server.log} == seeds
    assert (resumed.parent / "x.jsonl.asked").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert resumed.read_bytes() == whole.read_bytes()


# ---- the key


def test_the_key_is_sent_and_stands_nowhere(server, tmp_path, capsys):
    server.act = lambda asked, _: (
        (400, {}, json.dumps({"error": {"message": f"your key is {asked.key}"}}))
        if asked.document == 1
        else (200, {}, f'{{"key": "{KEY}"}}')
        if asked.document == 2
        else question_or_verdict(asked.prompt)
    )
    run(*arguments(server, documents(tmp_path, 3), tmp_path / "x.jsonl", tolerated=1.0))
    assert {asked.key for asked in server.log} == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    assert "your key is Bearer" in shown.out
    assert '{"key": ' in shown.out
    assert KEY not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_without_a_key_nothing_begins(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    message = "expected an API key in the environment variable OPENAI_API_KEY; got none; set it"
    with pytest.raises(ValueError, match=message) as found:
        run(*arguments(server, documents(tmp_path, 1), tmp_path / "x.jsonl"))
    assert "\n" not in cli.one_line(found.value)
    monkeypatch.setenv("MY_KEY", "other")
    named = ["--task.generator.key_variable", "MY_KEY"]
    run(*arguments(server, documents(tmp_path, 1), tmp_path / "x.jsonl"), *named)
    assert {asked.key for asked in server.log} == {"Bearer other"}


# ---- documents


def test_short_repeated_and_broken_documents_are_passed_over(server, tmp_path, capsys):
    given = documents(tmp_path, 2)
    with given.open("a") as file:
        file.write(json.dumps({"id": "short", "text": "town9x"}) + "\n")
        file.write(given.read_text().splitlines()[0] + "\n")
        file.write("{\n")
    with pytest.raises(ValueError, match=r"^1 of 5 documents are broken \(tolerated: 10\.0%\)"):
        run(*arguments(server, given, tmp_path / "x.jsonl"))
    run(*arguments(server, given, tmp_path / "x.jsonl", tolerated=0.2))
    shown = capsys.readouterr().out
    assert "5 documents: 2 rows kept" in shown
    assert "passed over 1: broken JSON" in shown
    assert len(server.log) == 4
    assert "passed over 1: shorter than 1,000 characters" in shown
    assert "passed over 1: the same text as an earlier one" in shown
    assert {asked.document for asked in server.log} == {0, 1}


def test_rows_hold_whole_documents_and_can_be_prepared(server, tmp_path):
    given, output = documents(tmp_path, 8), tmp_path / "x.jsonl"
    run(*arguments(server, given, output, questions=2))
    texts = {row["id"]: row["text"] for row in rows_of(given)}
    for row in rows_of(output):
        begin, end = row["chunk"]
        text = texts[row["id"].partition("#")[0]]
        assert row["document"] == text
        assert end - begin == 300
        asked = row["prompts"]["question"].format(
            style=row["prompts"]["style"], passage=text[begin:end]
        )
        assert f"<question>{row['question']}</question>" in question_or_verdict(asked)
    content = prepare(str(output), str(tmp_path / "data"), chat=True, tolerated=0.0)
    assert content
    assert sum(split["documents"] for split in content["splits"].values()) == 16


# ---- a checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    llama = Llama(config, RoPE(theta=1e4))
    for weight in llama.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    llama.head_weight.data[257] *= 3  # or EOS would hardly come
    return llama, export_pretrained(llama, tmp_path / "hf", tokenizer=ByteTokenizer())


@pytest.mark.slow
def test_a_checkpoint_continues_the_prompt_as_its_chat_template_has_it(checkpoint):
    llama, folder = checkpoint
    model = Checkpoint(str(folder), max_tokens=24, temperature=1.0, top_p=0.9)
    ids = [256, *b"<|user|>\nWho?", 257, *b"\n<|assistant|>\n"]
    lengths = set()
    for seed in range(6):
        new = generate(llama, torch.tensor([ids]), 24, 1.0, eos=257, seed=seed, top_p=0.9)[
            0, len(ids) :
        ].tolist()
        until = new.index(257) if 257 in new else len(new)
        text = bytes(i for i in new[:until] if i < 256).decode(errors="replace")
        expected = Reply(text, len(ids), min(until + 1, 24), cut=until == 24)
        assert model.complete("Who?", seed) == expected
        lengths.add(until)
    assert len(lengths) > 1  # some replies end before the limit


SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>", "<|eot_id|>"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "end"), [("llama2", "</s>"), ("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>")]
)
def test_a_prompt_is_what_transformers_would_generate_from(template, end, checkpoint, tmp_path):
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the passage at the end"] * 5, trainer)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    jinja = Path(__file__).parent / "data" / "templates" / f"{template}.jinja"
    shutil.copy(jinja, folder / "chat_template.jinja")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    said = {"role": "user", "content": "Ask about the passage {x}:\n\nthé end"}
    expected = theirs.apply_chat_template([said], add_generation_prompt=True, return_dict=False)
    found = Checkpoint(str(checkpoint[1]), tokenizer=str(folder)).prompt_ids(said["content"])
    assert found == (expected, {model.token_to_id(end), model.token_to_id("</s>")})


def test_a_checkpoint_end_to_end(checkpoint, tmp_path, capsys):
    output = tmp_path / "x.jsonl"
    flags = ["--task", "SelfInstruct", "--task.input", str(documents(tmp_path, 3))]
    flags += ["--task.chunk", "50", "--task.shortest", "100", "--task.tolerated", "1"]
    flags += ["--task.generator", "Checkpoint", "--task.generator.checkpoint", str(checkpoint[1])]
    flags += ["--task.generator.max_tokens", "5", "--task.generator.device", "cpu"]
    for before in (0, 3):
        run(*flags, "--output", str(output))
        shown = capsys.readouterr().out
        assert "3 documents: 0 rows kept, 0 filtered by critique, 3 failed" in shown
        empty = re.search(r"failed (\d): empty", shown)  # such are asked again
        asked = 3 - before + (int(empty[1]) if empty and before else 0)
        assert f"  {asked} replies of this run, {3 - asked} replies of earlier runs" in shown
        assert rows_of(output) == []
        output.unlink()
    run(*flags, "--output", str(output), "--task.generator.max_tokens", "6")
    assert "  3 replies of this run, 0 replies" in capsys.readouterr().out


def test_the_function_returns_what_it_reports(checkpoint, tmp_path, monkeypatch):
    """By relative paths: they decide the seed, and a reply of another seed may be empty."""
    monkeypatch.chdir(tmp_path)
    model = Checkpoint(checkpoint[1].name, max_tokens=5, device="cpu")
    given = documents(tmp_path, 2).name
    task = synthesize.SelfInstruct(given, model, chunk=50, shortest=100, tolerated=1.0)
    found = synthesize.synthesize(task, "x.jsonl")
    assert (found["documents"], found["kept"], found["filtered"]) == (2, 0, 0)
    assert dict(found["failed"]) == {"no question and answer in the reply": 2}
    assert found["costs"]["requests"] == 2


# ---- from nothing


def looked_up(document, question):
    """Answer from the document's text alone."""
    if key := re.fullmatch(r"(\w+):", question):
        value = key[1]
        while found := re.search(rf"^{value}: (\w+)$", document, re.MULTILINE):
            value = found[1]
        return value
    head, *lines = [line.split(" | ") for line in document.split("\n")]
    if asked := re.fullmatch(r"What is the (\w+) of (\w+)\?", question):
        return next(line[head.index(asked[1])] for line in lines if line[0] == asked[2])
    asked = re.fullmatch(r"Which name has (\d+) as its (\w+)\?", question)
    assert asked
    return next(line[0] for line in lines if line[head.index(asked[2])] == asked[1])


@pytest.mark.parametrize(
    "kind", [["KeyValues", "--task.kind.hops", "3"], ["Table", "--task.kind.columns", "2"]]
)
def test_documents_from_nothing_fill_the_length_and_hold_the_answers(kind, tmp_path, capsys):
    output = tmp_path / "x.jsonl"
    flags = ["--task", "TemplatedTask", "--task.kind", *kind, "--task.kind.questions", "4"]
    flags += ["--task.tokens", "2000", "--output", str(output)]
    run(*flags, "--task.documents", "12", "--seed", "7")
    rows = rows_of(output)
    assert len(rows) == 48
    assert len({row["id"] for row in rows}) == 48
    assert len({row["document"] for row in rows}) == 12
    for row in rows:
        assert looked_up(row["document"], row["question"]) == row["answer"]
        assert 1800 < len(row["document"]) < 2000
    assert "12 documents: 48 rows kept" in capsys.readouterr().out
    content = prepare(str(output), str(tmp_path / "data"), chat=True, tolerated=0.0)
    assert content
    assert sum(split["documents"] for split in content["splits"].values()) == 48
    output.unlink()
    run(*flags, "--task.documents", "5", "--seed", "7")
    assert rows_of(output) == rows[:20]
    output.unlink()
    run(*flags, "--task.documents", "5", "--seed", "8")
    assert not {row["document"] for row in rows_of(output)} & {row["document"] for row in rows}


# ---- the verb


def test_the_output_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "new" / "x.jsonl"
    flags = ["--task", "TemplatedTask", "--task.kind", "Table", "--output", str(output)]
    with pytest.raises(ValueError, match="expected a budget of"):
        run(*flags, "--task.tokens", "5")
    assert list(output.parent.iterdir()) == []
    run(*flags, "--task.tokens", "500", "--task.documents", "2")
    written = output.read_bytes()
    with pytest.raises(ValueError, match=r"x\.jsonl exists already; choose another file"):
        run(*flags, "--task.tokens", "500")
    assert output.read_bytes() == written
    with pytest.raises(ValueError, match=r"an output that ends in \.jsonl; got x\.txt; rename it"):
        run(*flags[:-1], "x.txt")


def test_what_another_wrote_meanwhile_is_not_replaced(server, tmp_path):
    output = tmp_path / "x.jsonl"

    def act(asked, _):
        output.write_text("theirs")
        return question_or_verdict(asked.prompt)

    server.act = act
    with pytest.raises(ValueError, match=r"x\.jsonl exists already"):
        run(*arguments(server, documents(tmp_path, 1), output))
    assert output.read_text() == "theirs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost/v1"}, "a base_url of http:// or https://; got localhost/v1; mend"),
        ({"concurrency": 0}, "a concurrency of 1 or more; got 0; raise it"),
        ({"requests_per_minute": 0}, "requests_per_minute above 0; got 0.0; raise it or leave"),
        ({"questions": 0}, "questions and chunk of 1 or more; got 0 and 300; raise them"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(server, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(*arguments(server, documents(tmp_path, 1), tmp_path / "x.jsonl", **options))


def test_without_the_client_library_the_error_names_the_extra(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    message = r"needs the package openai; pip install 'lit_longctx\[synthesize\]'"
    with pytest.raises(ValueError, match=message):
        Endpoint(server.url, "parrot")


def test_help_explains_the_tasks(capsys):
    for name, expected in [
        ("SelfInstruct", "Characters that a question is asked about"),
        ("TemplatedTask", "What the documents are"),
    ]:
        with pytest.raises(SystemExit):
            run("--task.help", name)
        assert expected in capsys.readouterr().out
