"""Two processes are one, and checkpoints are whole or not there."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from differences import assert_near
from lightning.pytorch import Callback, LightningModule, Trainer
from schemes import every_scheme
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from training import runs

from lit_longctx import manifest
from lit_longctx.batch import StepBatch, pack
from lit_longctx.checkpoint import load_pretrained, newest_whole
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.training.checkpoints import Checkpoints
from lit_longctx.training.module import ContinualPretrain
from lit_longctx.training.parallel import apply_sharding

# ---- processes

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)


@pytest.mark.parametrize(
    "start", [runs.together, pytest.param(runs.by_torchrun, marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(start: Callable[[], runs.Ran]):
    one, two = (runs.witnessed(ran.folder) for ran in (runs.alone(), start()))
    assert sorted(one) == sorted(two) == list(range(1, 31))
    assert runs.samples(one) == runs.samples(two)
    weights = [[row[2] for row in rows] for rows in runs.samples(two)]
    assert all(sum(w[:4]) != sum(w[4:]) for w in weights)  # the ranks' shares of every step differ
    for name in runs.NUMBERS:
        found, expected = ([getattr(e[step], name) for step in sorted(e)] for e in (two, one))
        difference = runs.largest_difference(found, expected)
        print(f"2 processes and 1: {name} differs by {difference:.1e}")
        assert difference <= 1e-6


def test_two_processes_validate_as_one():
    one, two = (runs.scalars(ran.folder) for ran in (runs.alone(), runs.together()))
    names = [name for name in one if name.startswith("val/")]
    assert len(names) == 9  # loss, perplexity, two positions, three lengths, two sources
    for name in names:
        assert len(one[name]) == 3
        found, expected = ([value for _, value in tags[name]] for tags in (two, one))
        assert runs.largest_difference(found, expected) <= 1e-6, name


def test_two_processes_end_with_the_weights_of_one():
    one, two = (load_pretrained(ran.folder).state_dict() for ran in (runs.alone(), runs.together()))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name


def compare_sharded_gradients(rank: int, port: int) -> None:
    """Compare gradients of every scheme, each rank with half the rows, with one process's own."""
    runs.rank_zero_only.rank = rank
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, CONFIG.vocab_size, (4, 65), generator=generator)
    tokens[:, [0, 20, 41]] = 1
    for scheme in every_scheme(8):
        plain, sharded = (Llama(CONFIG, scheme) for _ in range(2))
        for weight in plain.parameters():
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
        sharded.load_state_dict(plain.state_dict())
        apply_sharding(sharded, mesh, torch.float32)
        plain.loss(pack(tokens, bos=1))[0].backward()
        sharded.loss(pack(tokens[2 * rank : 2 * rank + 2], bos=1))[0].backward()
        expected = dict(plain.named_parameters())
        for name, weight in sharded.named_parameters():
            sum_of_ranks = 2 * weight.grad.full_tensor()
            assert_near(f"FSDP2, {scheme}, {name}", sum_of_ranks, expected[name].grad, **CLOSE)
    torch.distributed.destroy_process_group()


CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.slow
def test_every_scheme_has_the_same_gradients_under_fsdp2():
    forks, port = multiprocessing.get_context("forkserver"), runs.free_port()
    ranks = [forks.Process(target=compare_sharded_gradients, args=(r, port)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(runs.TIMEOUT)
    assert [rank.exitcode for rank in ranks] == [0, 0]


RECURRENCE = {
    "model": {
        "class_path": "ContinualPretrain",
        "init_args": {
            "memory": 2,
            "position": {"class_path": "TransformerXL", "init_args": {"distance_dim": 8}},
        },
    },
    "data": {"class_path": "PretrainData", "init_args": {"contiguous": True}},
}


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], runs.Ran]:
    """Options of Transformer-XL with recurrence, and 20 steps of it on one process."""
    folder = tmp_path_factory.mktemp("recurrent")
    (folder / "recurrence.yaml").write_text(yaml.safe_dump(RECURRENCE))
    options = ["--config", str(folder / "recurrence.yaml"), "--trainer.max_steps", "20"]
    return options, runs.fit(folder / "run", *options).succeeded()


@pytest.mark.slow
def test_memory_is_that_of_each_row_however_rows_are_spread(
    recurrent: tuple[list[str], runs.Ran], tmp_path: Path
):
    options, alone = recurrent
    expected = runs.witnessed(alone.folder)
    size = ["--data.init_args.micro_batch_size", 2]
    ran = runs.fit(tmp_path / "spread", *options, *size, ranks=2).succeeded()
    assert ran.err == ""
    spread = runs.witnessed(tmp_path / "spread")
    assert runs.samples(spread) == runs.samples(expected)
    assert runs.largest_difference(runs.losses(spread), runs.losses(expected)) <= 1e-6
    off = ["--model.init_args.memory", 0]
    without = runs.witnessed(runs.fit(tmp_path / "off", *options, *off).succeeded().folder)
    assert runs.samples(without) == runs.samples(expected)
    apart = [abs(without[n].loss - expected[n].loss) / expected[n].loss for n in expected]
    assert apart[0] == 0  # nothing to remember yet
    assert min(apart[1:]) > 1e-6


@pytest.mark.slow
def test_recurrence_goes_on_with_the_next_samples_and_an_empty_memory(
    recurrent: tuple[list[str], runs.Ran], tmp_path: Path
):
    options, alone = recurrent
    expected = runs.witnessed(alone.folder)
    start = alone.folder / "checkpoints" / "step-00000010"
    ran = runs.fit(tmp_path, *options, "--ckpt_path", start).succeeded()
    assert "step 10: resumed with an empty memory" in ran.out
    found = runs.witnessed(tmp_path)
    assert runs.samples(found) == runs.samples(expected)[10:]
    assert found[11].loss != expected[11].loss
    assert runs.largest_difference(runs.losses(found), runs.losses(expected)[10:]) < 0.05


@pytest.mark.slow
def test_products_in_bfloat16_leave_weights_and_moments_in_float32(tmp_path: Path):
    products = ["--model.init_args.compute_dtype", "bfloat16"]
    ran = runs.fit(tmp_path, *products, ranks=2).succeeded()
    assert ran.err == ""
    stored = dcp.FileSystemReader(newest_whole(tmp_path / "checkpoints")).read_metadata()
    tensors = [t for t in stored.state_dict_metadata.values() if hasattr(t, "properties")]
    assert {t.properties.dtype for t in tensors} == {torch.float32}
    found, exact = (runs.losses(runs.witnessed(f)) for f in (tmp_path, runs.alone().folder))
    difference = runs.largest_difference(found, exact)
    print(f"bfloat16 and float32: loss differs by {difference:.1e}")
    assert 0 < difference <= 5e-3


@pytest.mark.slow
def test_a_blow_up_on_one_process_stops_both_before_the_update(tmp_path: Path):
    poison = {"class_path": "training.runs.Poison", "init_args": {"rank": 1, "step": 2}}
    ran = runs.fit(tmp_path, "--trainer.callbacks+", json.dumps(poison), ranks=2)
    assert ran.code == 1
    (error,) = ran.err.splitlines()  # both raise; the first to do so is shown
    assert error.startswith("lit_longctx: error: step 2: loss nan")
    rank = int("on rank 1" in error)
    assert f"samples {16 + 4 * rank} to {19 + 4 * rank} on rank {rank}" in error
    for rank in (0, 1):
        assert f"rank {rank} step 2 weights same True" in ran.out
    assert not (tmp_path / "checkpoints").exists()


# ---- checkpoints: saving

ROWS = 2


@pytest.fixture
def process_group() -> Iterator[None]:
    with runs.own_process_group():
        yield


def train(folder: Path, steps: int, *callbacks: Callback) -> None:
    """Train on noise, a step of two rows at a time, in this process."""
    rows = [torch.randint(2, CONFIG.vocab_size, (ROWS, 17)) for _ in range(steps)]
    data = [
        StepBatch([pack(tokens, bos=1)], ROWS * i, 16 * ROWS * i)
        for i, tokens in enumerate(rows, 1)
    ]
    module = ContinualPretrain(config=CONFIG, compute_dtype="float32", learning_rate=1e-2)
    trainer = runs.quiet_trainer(folder, steps, list(callbacks))
    trainer.fit(module, DataLoader(data, batch_size=None))


class Interrupted(BaseException):
    """The process ends here."""


WRITES: list[tuple[Any, str]] = [
    (dcp, "save"),
    (torch, "save"),
    (manifest, "flush"),
    (manifest, "digest"),
    (shutil, "rmtree"),
    *((Path, name) for name in ("mkdir", "write_text", "rename", "replace", "unlink")),
]
"""What touches the disk, or ends a stretch that does."""


def interrupted_before(
    number: int, work: Callable[[], None], patch: pytest.MonkeyPatch
) -> str | None:
    """Do the work up to its n-th write; return that write's name, or None if there are fewer."""
    seen = count()
    struck = []

    def stopping(owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def stop(*args: Any, **kwargs: Any) -> Any:
            if struck or next(seen) == number:
                struck.append(f"{owner.__name__}.{name}")
                raise Interrupted
            return original(*args, **kwargs)

        return stop

    with patch.context() as context:
        for owner, name in WRITES:
            context.setattr(owner, name, stopping(owner, name))
        try:
            work()
        except BaseException:
            if not struck:
                raise
    return struck[0] if struck else None


class Torment(Callback):
    """Cuts off the saving of step 3, in a run that holds 1 and 2, before each of its writes."""

    def __init__(self, patch: pytest.MonkeyPatch, again: bool) -> None:
        self.patch, self.again = patch, again
        self.saving = Checkpoints(every_n_steps=1, keep=2)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.found: list[tuple[str | None, int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: StepBatch, i: int
    ) -> None:
        self.weights[trainer.global_step] = runs.whole_weights(module)
        if trainer.global_step < 3:
            self.saving._save(trainer)
        else:
            self.torment(trainer)

    def torment(self, trainer: Trainer) -> None:
        run = Path(trainer.default_root_dir)
        if self.again:  # a step that is there already, after a resume from before it
            trainer.save_checkpoint(run / "checkpoints" / "step-00000003")
        kept = shutil.copytree(run, run.with_name("kept"))
        for number in count():
            shutil.rmtree(run)
            shutil.copytree(kept, run)
            struck = interrupted_before(number, lambda: self.saving._save(trainer), self.patch)
            self.found.append((struck, self.newest(run)))
            if struck is None:
                return

    def newest(self, run: Path) -> int:
        """Return the newest whole step, after comparing all that it holds with what was saved."""
        folder = newest_whole(run / "checkpoints")
        step = int(folder.name.removeprefix("step-"))
        stored = load_pretrained(folder).state_dict()
        for name, weight in self.weights[step].items():
            assert torch.equal(stored[name.removeprefix("llama.")], weight)
        meta = torch.load(folder / "meta.pt", weights_only=True)
        assert (meta["global_step"], meta["samples_consumed"]) == (step, ROWS * step)
        return step


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.usefixtures("process_group")
def test_saving_cut_off_anywhere_leaves_the_old_step_or_the_new(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torment = Torment(monkeypatch, again)
    train(tmp_path / "run", 3, torment)
    writes, newest = zip(*torment.found, strict=True)
    print(*torment.found)
    assert {"torch.save", "Path.mkdir", "Path.rename", "Path.replace", "Path.unlink"} <= set(writes)
    assert set(newest) == {2, 3}
    if not again:
        assert list(newest) == sorted(newest)  # once the new step is there, it stays


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("keep", "kept"), [(1, [7]), (2, [6, 7]), (3, [4, 6, 7])])
@pytest.mark.usefixtures("process_group")
def test_the_newest_checkpoints_are_kept(keep: int, kept: list[int], tmp_path: Path):
    train(tmp_path, 7, Checkpoints(every_n_steps=2, keep=keep))
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.glob("*")) == [
        "latest",
        *(f"step-{step:08d}" for step in kept),
    ]
    assert (folder / "latest").read_text() == "step-00000007\n"


def test_at_least_one_checkpoint_is_kept():
    with pytest.raises(ValueError, match="keep 0"):
        Checkpoints(keep=0)


# ---- checkpoints: torn ones


def truncate(folder: Path) -> str:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return f"{shard} is torn"


def alter(folder: Path) -> str:
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return f"{shard} is altered"


def lose_a_shard(folder: Path) -> str:
    shard = next(folder.glob("*.distcp"))
    shard.unlink()
    return f"{shard} is missing"


def lose_the_metadata(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return f"{folder / '.metadata'} is missing"


def never_finish(folder: Path) -> str:
    (folder / manifest.NAME).unlink()
    return f"{folder} is not finished"


def tear_the_manifest(folder: Path) -> str:
    path = folder / manifest.NAME
    path.write_text(path.read_text()[:200])
    return f"{path} is torn"


DAMAGES = [truncate, alter, lose_a_shard, lose_the_metadata, never_finish, tear_the_manifest]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with checkpoints at 10, 20 and 30."""
    return Path(shutil.copytree(runs.alone().folder, tmp_path / "run"))


@pytest.mark.parametrize(
    "damage", [DAMAGES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in DAMAGES[1:])]
)
def test_a_torn_checkpoint_is_refused_by_file_and_the_newest_whole_one_offered(
    damage: Callable[[Path], str], run_folder: Path
):
    steps = run_folder / "checkpoints"
    fault = damage(steps / "step-00000030")
    ran = runs.fit(run_folder, "--ckpt_path", steps / "step-00000030", "--trainer.max_steps", 40)
    assert ran.code == 1
    offer = f"the newest whole one is {steps / 'step-00000020'}"
    (line,) = ran.err.splitlines()
    assert line.startswith(f"lit_longctx: error: {fault}")
    assert line.endswith(offer)


@pytest.mark.slow
def test_a_torn_checkpoint_without_a_whole_one_beside_it_is_refused_by_both_processes(
    run_folder: Path,
):
    steps = run_folder / "checkpoints"
    for step in (10, 20):
        shutil.rmtree(steps / f"step-{step:08d}")
    fault = alter(steps / "step-00000030")
    ran = runs.fit(run_folder, "--ckpt_path", steps / "step-00000030", ranks=2)
    assert ran.code == 1
    (line,) = ran.err.splitlines()  # of two processes that failed, the first one's
    assert line.startswith(f"lit_longctx: error: {fault}")
    assert line.endswith("there is no whole one beside it")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [alter, pytest.param(never_finish, marks=pytest.mark.slow)])
def test_last_goes_on_from_the_newest_whole_one_and_says_so(
    damage: Callable[[Path], str], run_folder: Path
):
    steps = run_folder / "checkpoints"
    fault = damage(steps / "step-00000030")
    shutil.copytree(steps / "step-00000020", steps / "step-00000040.tmp-0a1b2c3d")
    ran = runs.fit(run_folder, "--ckpt_path", "last", "--trainer.max_steps", 22).succeeded()
    assert f"skipping step-00000030: {fault}" in ran.out
    assert sorted(runs.witnessed(run_folder)) == list(range(1, 23))
    assert not list(steps.glob("*.tmp-*"))  # what a killed process left would fill the disk


@pytest.mark.slow
def test_last_with_nothing_whole_is_refused(run_folder: Path):
    for step in (10, 20, 30):
        alter(run_folder / "checkpoints" / f"step-{step:08d}")
    ran = runs.fit(run_folder, "--ckpt_path", "last")
    assert ran.code == 1
    assert ran.err == (
        f"lit_longctx: error: {run_folder / 'checkpoints'} holds no whole checkpoint; "
        "start the run anew\n"
    )


def test_a_folder_that_holds_a_run_is_not_begun_again(run_folder: Path):
    before = sorted(run_folder.rglob("*"))
    ran = runs.fit(run_folder)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith(f"lit_longctx: error: {run_folder} holds a run already")
    assert "--ckpt_path last" in line
    assert sorted(run_folder.rglob("*")) == before
