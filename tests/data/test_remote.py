"""Against moto's S3 server in a process of its own, on loopback."""

import contextlib
import json
import multiprocessing
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import pytest
import torch

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import SHUFFLED_CHUNKS, PretrainData, Source
from lit_longctx.data.sampling.sample_index import SampleIndex
from lit_longctx.data.store import remote
from lit_longctx.data.store.mds import MDSWindows
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.store.windows import Windows

pytest.importorskip("moto")

BLOCK, CHUNK = 256, 1024
CHUNK_BYTES = 12 + 2 * CHUNK  # header of one item, then uint16 tokens
URL = "s3://tokens/books"
CHUNKS = 13


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A prepared folder of 13 chunks, the last one short."""
    folder = tmp_path_factory.mktemp("remote") / "books"
    generator = random.Random(0)
    with open(folder.with_suffix(".jsonl"), "w") as file:
        for _ in range(72):
            text = "".join(generator.choices("abcdefgh", k=generator.randint(1, 380)))
            file.write(json.dumps({"text": text}) + "\n")
    rows = str(folder.with_suffix(".jsonl"))
    prepare([rows], str(folder), held_out=0.1, chunk_tokens=CHUNK)
    assert len(list((folder / "train").glob("*.bin"))) == CHUNKS
    return folder


SERVER = """
import signal
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""
"""Listens at a port of the system's choice, and tells it once it does."""


@contextmanager
def server_process():
    """Port of a fresh S3 server, and a client for it; fake credentials in the environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            environment.setenv(name, "fake")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_PROFILE"):
            environment.delenv(name, raising=False)
        try:
            client = boto3.client("s3")
            client.create_bucket(Bucket="tokens")
            yield port, client
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server():
    with server_process() as found:
        yield found


@pytest.fixture(scope="module")
def uploaded(server, local):
    _, client = server
    upload(client, local, "books")
    return client


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "tokens", f"{prefix}/{path.relative_to(folder)}")


@pytest.fixture
def alone(uploaded, local, request):
    """URL of a copy of the folder that a test may damage, and its client and prefix."""
    prefix = request.node.name.replace("[", "-").replace("]", "")
    upload(uploaded, local, prefix)
    return SimpleNamespace(url=f"s3://tokens/{prefix}", client=uploaded, prefix=prefix)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.001)


def of(cache, chunks):
    """A cache with room for so many chunks, and for the small files beside them."""
    return ObjectStorage(cache=str(cache), cache_gib=(chunks * CHUNK_BYTES + 1) / 2**30)


def everything(windows):
    return [windows[i].tolist() for i in range(len(windows))]


def cached(cache):
    return [path for path in (Path(cache) / "files").rglob("*") if path.is_file()]


def chunk_fetches(windows):
    return {name: n for name, n in windows.fetches.items() if name.endswith(".bin")}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("split", "length"), [("train", 768), ("held_out", 256)])
def test_remote_is_local_token_for_token(uploaded, local, cache, split, length):
    windows = Windows(URL, split, length, ObjectStorage(cache=str(cache)))
    on_disk = Windows(local, split, length)
    assert everything(windows) == everything(on_disk)
    assert (len(windows), windows.tokens) == (len(on_disk), on_disk.tokens)
    assert windows.manifest == on_disk.manifest
    assert windows.document_lengths().tolist() == on_disk.document_lengths().tolist()
    assert windows.read(0, windows.tokens).tolist() == on_disk.read(0, on_disk.tokens).tolist()
    assert set(windows.fetches.values()) == {1}
    assert not on_disk.fetches
    again = Windows(URL, split, length, ObjectStorage(cache=str(cache)))
    assert everything(again) == everything(on_disk)
    assert not again.fetches


def test_a_trailing_slash_and_storage_options(uploaded, local, cache, monkeypatch, server):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"endpoint_url": f"http://127.0.0.1:{server[0]}"}
    windows = Windows(f"{URL}/", "train", 256, ObjectStorage(str(cache), options=options))
    assert windows[3].tolist() == Windows(local, "train", 256)[3].tolist()


def test_default_cache_is_named_by_the_environment(uploaded, cache, monkeypatch):
    monkeypatch.setenv("LIT_LONGCTX_CACHE", str(cache / "by environment"))
    Windows(URL, "train", 256)[0]
    assert {path.name for path in cached(cache / "by environment")} == {
        "index.json",
        "chunk-0-0.bin",
    }
    monkeypatch.delenv("LIT_LONGCTX_CACHE")
    assert ObjectStorage().root == Path.home() / ".cache/lit_longctx/chunks"


@pytest.mark.slow
def test_files_on_disk_stay_within_the_bound(uploaded, local, cache, monkeypatch):
    storage = of(cache, 7)
    largest = []
    download = remote.download

    def watched(*arguments):
        download(*arguments)
        largest.append(sum(path.stat().st_size for path in cached(cache)))

    monkeypatch.setattr(remote, "download", watched)
    windows = Windows(URL, "train", 256, storage)
    on_disk = Windows(local, "train", 256)
    generator = random.Random(0)
    for index in generator.choices(range(len(windows)), k=100):
        assert windows[index].tolist() == on_disk[index].tolist()
    assert 6 * CHUNK_BYTES < max(largest) <= 7 * CHUNK_BYTES + 1
    assert max(chunk_fetches(windows).values()) > 2  # evicted chunks came again
    assert sum(chunk_fetches(windows).values()) > 30


def test_an_epoch_in_groups_fetches_each_chunk_once(uploaded, local, cache):
    """But the first of a group twice: the last target of the group before it is in there."""
    index = (local / "train" / "index.json").stat().st_size
    room = (SHUFFLED_CHUNKS + 1) * CHUNK_BYTES + index
    windows = Windows(URL, "train", 512, ObjectStorage(str(cache), cache_gib=room / 2**30))
    order = SampleIndex([len(windows)], None, 0, [SHUFFLED_CHUNKS * CHUNK // 512])
    read = [order(sample)[1] for sample in range(len(windows))]
    assert sorted(read) == list(range(len(windows)))
    for window in read:
        windows[window]
    fetches = chunk_fetches(windows)
    assert len(fetches) == CHUNKS
    first_of_group = {f"train/chunk-0-{i}.bin" for i in range(SHUFFLED_CHUNKS, CHUNKS, 4)}
    assert {name for name, n in fetches.items() if n > 1} <= first_of_group
    assert max(fetches.values()) <= 2


def test_an_epoch_fetches_each_chunk_once_where_two_groups_fit(uploaded, local, cache):
    windows = Windows(URL, "train", 512, of(cache, CHUNKS + 2))
    order = SampleIndex([len(windows)], None, 0, [SHUFFLED_CHUNKS * CHUNK // 512])
    for sample in range(2 * len(windows)):
        windows[order(sample)[1]]
    assert chunk_fetches(windows) == {f"train/chunk-0-{i}.bin": 1 for i in range(CHUNKS)}


def test_the_least_recently_opened_goes_first_and_what_is_in_use_last(uploaded, cache):
    windows = Windows(URL, "train", 1024, of(cache, 3))
    files = windows.files
    names = [f"train/chunk-0-{i}.bin" for i in range(5)]
    held = files.open(names[0])
    files.open(names[1]).close()
    files.open(names[2]).close()
    files.open(names[1]).close()  # now chunk 2 is the oldest that nobody uses
    files.open(names[3]).close()
    assert {path.name for path in cached(cache)} == {f"chunk-0-{i}.bin" for i in (0, 1, 3)}
    held.close()
    files.open(names[4]).close()
    assert {path.name for path in cached(cache)} == {f"chunk-0-{i}.bin" for i in (1, 3, 4)}


def test_a_chunk_that_is_evicted_while_mapped_is_still_read(uploaded, local, cache):
    windows = Windows(URL, "train", 1024, of(cache, 2))
    expected = Windows(local, "train", 1024)
    assert windows[0].tolist() == expected[0].tolist()
    for path in cached(cache):
        path.unlink()
    before = Counter(windows.fetches)
    assert windows[0].tolist() == expected[0].tolist()
    assert windows.fetches == before


@pytest.mark.slow
def test_a_file_larger_than_the_cache_is_refused_with_the_cure(uploaded, cache):
    windows = Windows(URL, "train", 256, ObjectStorage(str(cache), cache_gib=3000 / 2**30))
    windows.read(0, 10)
    small = ObjectStorage(str(cache), cache_gib=1000 / 2**30)
    with pytest.raises(
        ValueError, match=r"too small for a file of \d+ bytes; set storage.cache_gib"
    ):
        Windows(URL, "train", 256, small).files.open("train/chunk-0-1.bin")


@pytest.mark.slow
def test_a_cache_of_one_chunk_is_slow_but_right(uploaded, local, cache):
    windows = Windows(URL, "train", 768, of(cache, 1))
    assert everything(windows) == everything(Windows(local, "train", 768))
    assert len(cached(cache)) == 1


class Proxy(threading.Thread):
    """A TCP relay to the server that hangs up after `after` bytes of the next `cuts` answers."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.target, self.cuts, self.after = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self.relay, args=ends, daemon=True).start()

    def relay(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.cuts:
                    self.cuts -= 1
                    sink.sendall(data[: self.after])
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):  # closed already, from the other side
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(server, uploaded, monkeypatch):
    relay = Proxy(server[0])
    relay.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    yield relay
    relay.listener.close()


@pytest.mark.parametrize("after", [0, 1500])
def test_a_dropped_connection_is_survived(proxy, local, cache, after):
    windows = Windows(URL, "train", 1024, ObjectStorage(str(cache)))
    proxy.cuts, proxy.after = 2, after
    assert windows[0].tolist() == Windows(local, "train", 1024)[0].tolist()
    assert proxy.cuts == 0
    assert 2 < sum(windows.fetches.values()) <= 2 + 3


@pytest.mark.slow
def test_a_server_that_is_gone_is_one_line(proxy, cache):
    windows = Windows(URL, "train", 1024, ObjectStorage(str(cache)))
    proxy.cuts = 10**6
    message = rf"^{URL}/train/index\.json could not be read in 5 tries: .*; check the connection"
    with pytest.raises(ValueError, match=message) as error:
        windows[0]
    assert "\n" not in str(error.value)
    assert windows.fetches == {"train/index.json": 5}
    proxy.cuts = 0
    windows[0]


def corrupt(alone, local, name):
    content = bytearray((local / name).read_bytes())
    content[-7] ^= 8
    alone.client.put_object(Bucket="tokens", Key=f"{alone.prefix}/{name}", Body=bytes(content))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", ["train/chunk-0-1.bin", "train/index.json", "manifest.json"])
def test_a_corrupted_object_is_fetched_again_and_then_an_error(alone, local, cache, name):
    corrupt(alone, local, name)
    fetched = rf"^{alone.url}/{name} could not be read in 5 tries: .*; .*copy the file there again$"
    with pytest.raises(ValueError, match=fetched) as error:
        Windows(alone.url, "train", 1024, ObjectStorage(str(cache)))[0]
    assert "\n" not in str(error.value)
    assert str(cache) not in str(error.value)
    assert all(path.suffix != ".incomplete" and path.name not in name for path in cached(cache))


def test_a_download_that_came_corrupted_once_is_repaired(alone, local, cache, monkeypatch):
    name = "train/chunk-0-1.bin"
    corrupt(alone, local, name)

    def repair(seconds):
        if seconds:
            alone.client.upload_file(str(local / name), "tokens", f"{alone.prefix}/{name}")

    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=repair))
    windows = Windows(alone.url, "train", 1024, ObjectStorage(str(cache)))
    assert windows[1].tolist() == Windows(local, "train", 1024)[1].tolist()
    assert windows.fetches[name] == 2


def test_pauses_grow(monkeypatch, alone, local, cache):
    corrupt(alone, local, "manifest.json")
    pauses = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(remote, "PAUSE", 1.0)
    with pytest.raises(ValueError, match="in 5 tries"):
        Windows(alone.url, "train", 1024, ObjectStorage(str(cache)))
    assert pauses == [0, 1, 2, 4, 8]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("size", ["same", "shorter"])
def test_a_corrupted_file_in_the_cache_is_noticed_and_fetched_again(uploaded, local, cache, size):
    storage = ObjectStorage(str(cache))
    Windows(URL, "train", 1024, storage)[1]
    (path,) = (path for path in cached(cache) if path.name == "chunk-0-1.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content if size == "same" else content[:500])
    windows = Windows(URL, "train", 1024, storage)
    assert windows[1].tolist() == Windows(local, "train", 1024)[1].tolist()
    assert windows.fetches == {"train/chunk-0-1.bin": 1}
    assert path.read_bytes() == (local / "train/chunk-0-1.bin").read_bytes()


@pytest.mark.slow
def test_what_is_not_there_is_said_at_once(uploaded, cache):
    storage = ObjectStorage(str(cache))
    for url in ("s3://tokens/nothing", "s3://no-bucket/books"):
        message = f"^{url}/manifest.json cannot be read: .*404.*; check address and access$"
        with pytest.raises(ValueError, match=message):
            Windows(url, "train", 256, storage)
    with pytest.raises(ValueError, match=r"^folder ftp://a/b is at no known place; use a path or"):
        Windows("ftp://a/b", "train", 256, storage)
    with pytest.raises(ValueError, match="holds no split 'validation'"):
        Windows(URL, "validation", 256, storage)


def test_a_downloader_that_only_copies_files(local, cache):
    windows = Windows(f"local:{local}", "train", 256, ObjectStorage(str(cache)))
    assert everything(windows) == everything(Windows(local, "train", 256))
    assert not list(cache.rglob("*.bin.*"))
    with pytest.raises(
        ValueError, match=r"nowhere/manifest\.json cannot be read: .*; check address"
    ):
        Windows("local:/nowhere", "train", 256, ObjectStorage(str(cache)))


def test_a_file_copier_gets_another_try_too(local, tmp_path, cache, monkeypatch):
    copy = shutil.copytree(local, tmp_path / "copy")
    (copy / "train/chunk-0-0.bin").write_bytes(b"torn")

    def repair(seconds):
        if seconds:
            shutil.copy(local / "train/chunk-0-0.bin", copy / "train/chunk-0-0.bin")

    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=repair))
    windows = Windows(f"local:{copy}", "train", 256, ObjectStorage(str(cache)))
    assert windows[0].tolist() == Windows(local, "train", 256)[0].tolist()
    assert chunk_fetches(windows) == {"train/chunk-0-0.bin": 2}


def test_the_tokenizer_comes_to_disk(uploaded, local, cache):
    windows = Windows(URL, "train", 256, ObjectStorage(str(cache), cache_gib=0))
    for _ in range(2):
        folder = windows.tokenizer_folder
        names = sorted(path.name for path in (local / "tokenizer").iterdir())
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            assert (folder / name).read_bytes() == (local / "tokenizer" / name).read_bytes()
            (folder / name).write_text("damaged")
    assert Windows(local, "train", 256).tokenizer_folder == local / "tokenizer"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "train/../../x"])
def test_files_outside_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="lists a file outside of itself"):
        remote.RemoteFiles(URL, {name: {"bytes": 1}}, "key", ObjectStorage())


def read_and_count(windows, seed, queue):
    order = np.random.default_rng(seed).permutation(len(windows))
    tokens = {int(i): windows[int(i)].tolist() for i in order}
    queue.put(([tokens[i] for i in range(len(windows))], chunk_fetches(windows)))


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [CHUNKS + 2, 7])
def test_processes_share_one_cache(uploaded, local, cache, chunks):
    storage = of(cache, chunks)
    expected = everything(Windows(local, "train", 1024))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    windows = Windows(URL, "train", 1024, storage)
    workers = [
        context.Process(target=read_and_count, args=(windows, seed, queue)) for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert [tokens for tokens, _ in found] == [expected] * 3
    total = sum((Counter(fetches) for _, fetches in found), Counter())
    assert sum(path.stat().st_size for path in cached(cache)) <= chunks * CHUNK_BYTES + 1
    if chunks > CHUNKS:
        assert total == {f"train/chunk-0-{i}.bin": 1 for i in range(CHUNKS)}


def test_what_a_killed_process_left_is_cleaned_up(uploaded, cache):
    windows = Windows(URL, "train", 1024, of(cache, 3))
    windows[0]
    folder = next(iter(cached(cache))).parent
    (folder / "chunk-0-9.bin.incomplete").write_bytes(b"x" * 10**6)
    windows[2]
    assert not list(folder.glob("*.incomplete"))
    assert sum(path.stat().st_size for path in cached(cache)) <= 3 * CHUNK_BYTES + 1


@pytest.mark.slow
def test_copies_leave_open_files_behind(uploaded, local, cache):
    windows = Windows(URL, "train", 1024, ObjectStorage(str(cache)))
    windows[0]
    again = pickle.loads(pickle.dumps(windows))
    assert everything(again) == everything(Windows(local, "train", 1024))


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_packed_items_come_from_object_storage(uploaded, cache, name):
    golden = Path(__file__).parents[1] / "golden" / "mds" / name
    upload(uploaded, golden, f"packs/{name}")
    storage = ObjectStorage(str(cache))
    packs = MDSWindows(f"s3://tokens/packs/{name}", "train", 128, {"bos": 1}, storage)
    on_disk = MDSWindows(golden, "train", 128, {"bos": 1}, ObjectStorage(str(cache / "other")))
    for index in range(len(on_disk)):
        for ours, theirs in zip(packs[index], on_disk[index], strict=True):
            assert ours.tolist() == theirs.tolist()
    assert len(packs) == len(on_disk) == 10
    assert len(packs.fetches) == 3
    assert set(packs.fetches.values()) == {1}


def attach(data):
    """Give a data module what it reads of Lightning's Trainer."""
    data.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        max_steps=12,
        global_step=0,
        strategy=None,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    return data


def steps(folder, workers):
    data = PretrainData({"books": Source(str(folder))}, 256, 4 * 256, 2, num_workers=workers)
    return [
        [torch.cat([batch.input_ids, batch.labels]).tolist() for batch in step.micro_batches]
        for step in attach(data).train_dataloader()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_pretraining_reads_the_same_batches(uploaded, local, cache, workers, monkeypatch):
    monkeypatch.setenv("LIT_LONGCTX_CACHE", str(cache))
    assert steps(URL, workers) == steps(local, 0)
    assert len(cached(cache)) > 10
