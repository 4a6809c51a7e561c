"""Hub names, against a stand-in of the Hub's API on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest
import torch

from lit_longctx import hub
from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.data.making.prepare import anywhere
from lit_longctx.data.reading.documents import DocumentReader, Faults
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.manifest import NAME
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub as its client asks for; repositories lie in `server.repositories`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.asked = parse_qs(self.rfile.read(length).decode())
        self.do_GET()

    def do_GET(self):
        self.server.wait.wait(self.server.delay)
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        self.server.seen.append((self.command, "/".join(parts)))
        if parts[0] == "api":
            self.api("/".join(parts[2:4]), parts[4:])
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def revisions(self, name):
        if name == "org/gated":
            return self.refuse(403, "GatedRepo")
        if name not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        return self.server.repositories[name]

    def api(self, name, rest):
        if (found := self.revisions(name)) is None:
            return
        kind, revision = (*rest, "main")[:2] if rest else ("revision", "main")
        files = self.files(found, revision)
        if files is None:
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": sha(content)[:40]}
            for path, content in files.items()
        ]
        if kind == "tree":
            return self.answer(json.dumps(entries).encode())
        if kind == "paths-info":
            wanted = self.asked.get("paths", [])
            return self.answer(json.dumps([e for e in entries if e["path"] in wanted]).encode())
        about = {"id": name, "sha": commit(files), "siblings": [{"rfilename": p} for p in files]}
        self.answer(json.dumps(about).encode())

    def files(self, found, revision):
        for name, files in found.items():
            if revision in (name, commit(files)):
                return files
        return self.refuse(404, "RevisionNotFound")

    def file(self, name, revision, path):
        if (found := self.revisions(name)) is None:
            return
        if (files := self.files(found, revision)) is None:
            return
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[path]
        about = {"ETag": f'"{sha(content)}"', "X-Repo-Commit": commit(files)}
        self.answer(content, about)

    def refuse(self, status, code):
        self.answer(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def answer(self, content, headers=None, status=200):
        if (span := self.headers.get("Range")) and status == 200:
            first, last = span.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1 if last else None]
            status = 206
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return sha(repr(sorted(files.items())).encode())[:40]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, bytes]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "hf"
    llama = Llama(LlamaConfig(258, 32, 32, 1, 2, bos_token_id=256, eos_token_id=257), RoPE(500.0))
    export_pretrained(llama, folder, tokenizer=ByteTokenizer())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(model_files):
    serving = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    serving.daemon_threads = True
    serving.seen, serving.delay, serving.wait = [], 0.0, threading.Event()
    others = {"original/consolidated.safetensors": b"x", "pytorch_model.bin": b"x", "a.gguf": b"x"}
    config = json.loads(model_files["config.json"])
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 9.0
    tuned = {**model_files, "config.json": json.dumps(config).encode()}
    rows = b"".join(b'{"text": "%d"}\n' % i for i in range(50))
    serving.repositories = {
        "org/model": {"main": {**model_files, **others}, "tuned/v1": {**tuned, "README.md": b"r"}},
        "org/texts": {"main": {"data/a.jsonl": rows, "README.md": b"card", ".gitattributes": b"g"}},
    }
    threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True).start()
    yield serving
    serving.wait.set()
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def cached(server, tmp_path, monkeypatch) -> Path:
    """The client asks the stand-in, and has an empty cache."""
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def unreachable(monkeypatch):
    """Return what makes the Hub a place where nobody answers."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def fetched(server) -> set[str]:
    return {
        path.split("/")[-1] for method, path in server.seen if method == "GET" and "resolve" in path
    }


def test_a_model_is_fetched_once_and_found_without_the_hub(
    server, cached, model_files, unreachable
):
    llama = load_pretrained("org/model")
    assert fetched(server) == {*model_files} - {NAME}  # nor the other weights, nor the card
    assert llama.layers.position == RoPE(500.0)
    assert isinstance(open_tokenizer("org/model"), ByteTokenizer)
    server.seen.clear()
    again = load_pretrained("org/model")
    assert not fetched(server)
    assert sum(method == "HEAD" for method, _ in server.seen) <= len(model_files)
    unreachable()
    offline = load_pretrained("org/model")
    for a, b, c in zip(*(each.parameters() for each in (llama, again, offline)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(ValueError, match="cannot be reached, and the cache does not hold it whole"):
        load_pretrained("org/other")


def test_a_tokenizer_alone_brings_no_weights(server, cached, unreachable):
    open_tokenizer("org/model")
    assert fetched(server) == {"tokenizer.json", "tokenizer_config.json"}
    assert anywhere("org/model") == "org/model"
    unreachable()
    open_tokenizer("org/model")
    with pytest.raises(ValueError, match="the cache does not hold it whole"):
        open_checkpoint("org/model")


def test_a_revision_is_another_folder(server, cached, capsys):
    assert open_checkpoint("org/model@tuned/v1").layers.position == RoPE(9.0)
    assert open_checkpoint("org/model").layers.position == RoPE(500.0)
    files = server.repositories["org/model"]["tuned/v1"]
    assert open_checkpoint(f"org/model@{commit(files)}").layers.position == RoPE(9.0)
    assert f"org/model@tuned/v1: {cached}/models--org--model/snapshots/{commit(files)}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "there is no such repository, or it is private"),
        ("org/gated", "access is restricted; ask for it on its page"),
        ("org/model@none", "there is no such revision; check what stands behind the @"),
    ],
)
def test_what_is_not_to_be_had_is_one_line(server, cached, name, message):
    for open_it in (open_checkpoint, open_tokenizer):
        with pytest.raises(ValueError, match=message) as found:
            open_it(name)
        assert str(found.value).startswith(f"{name} is no folder here, and not to be had from the")
        assert "\n" not in str(found.value)


def test_a_hub_that_does_not_answer_is_waited_for_only_so_long(server, cached, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    server.delay = 30.0
    begin = time.monotonic()
    with pytest.raises(ValueError, match="it cannot be reached"):
        open_checkpoint("org/model")
    assert time.monotonic() - begin < 10


def test_paths_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "org").mkdir()
    names = ["org/name", "meta-llama/Llama-3.2-1B", "o/n@v1.0", "o/n@refs/pr/1"]
    assert [hub.is_name(name) for name in names] == [False, True, True, True]
    paths = [
        "runs/missing",
        "/org/name",
        "./a/b",
        "../a",
        "name",
        "a/b/c",
        "s3://a/b",
        "a/b@",
        "a b/c",
    ]
    assert not any(hub.is_name(path) for path in paths)


def test_texts_of_a_data_set_are_read(server, cached):
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    faults = Faults()
    found = list(DocumentReader().documents(["hf://datasets/org/texts"], faults))
    assert [document.text for document in found] == [str(i) for i in range(50)]
    assert found[0].id == "data/a.jsonl:1"


def test_a_data_set_that_does_not_answer_is_one_line(server, cached, monkeypatch):
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    server.delay = 30.0
    begin = time.monotonic()
    with pytest.raises(ValueError, match="hf://datasets/org/texts cannot be listed: ") as found:
        DocumentReader().file_parts(["hf://datasets/org/texts"])
    assert "\n" not in str(found.value)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_the_verbs_take_names(server, tmp_path):
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    for verb in (
        ["prepare", "--input", "a.jsonl", "--tokenizer", "org/model", "--output", "out"],
        [
            "generate",
            "--checkpoint",
            "org/model@tuned/v1",
            "--prompt",
            "a",
            "--max_new_tokens",
            "2",
        ],
    ):
        for offline in ("0", "1"):  # the second time from the cache
            script = "from lit_longctx.cli import entry; entry()"
            run = subprocess.run(
                [sys.executable, "-c", script, *verb],
                env={**os.environ, **variables, "HF_HUB_OFFLINE": offline},
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert run.returncode == 0, run.stderr
            verb = [*verb[:-1], "again"] if verb[0] == "prepare" else verb
