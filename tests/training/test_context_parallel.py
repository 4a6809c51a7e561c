"""A row spread over processes gives what it gives on one."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from training import runs

from lit_longctx.batch import Batch, pack
from lit_longctx.checkpoint import load_pretrained
from lit_longctx.context_parallel import apply_context_parallel, context_parallel
from lit_longctx.context_parallel.balance import balanced
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import (
    DynamicNTK,
    LongRoPE,
    NoPE,
    QueryTemperature,
    RoPE,
    TransformerXL,
    XPos,
    YaRN,
)
from lit_longctx.training import parallel
from lit_longctx.training.activations import apply_levers
from lit_longctx.training.fit import fill_in_launcher
from lit_longctx.training.optimizers import make_optimizer

SEQ = 96
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.5, 3.5, 4.5]}
NAMES = ("zigzag", "ulysses")
POSITIONS = {
    "RoPE": RoPE(),
    "YaRN": YaRN(factor=4, original_context=64),
    "DynamicNTK": DynamicNTK(factor=2, original_context=10),
    "LongRoPE": LongRoPE(factor=4, original_context=10, unscaled_tokens=2, **FACTORS),
    "XPos": XPos(),
    "TransformerXL": TransformerXL(distance_dim=8),
    "local window": Layers(
        (LayerKind(RoPE(), 9), LayerKind(NoPE(), 40, QueryTemperature(8, 0.5))), (0, 1)
    ),
}
HEADS = {"MHA": (6, 6), "GQA": (6, 3), "MQA": (6, 1)}
LAYOUTS = (
    "one document",
    "packed",
    "best fit, odd length",
    "padding on one process",
    "a document over every border",
    "documents of one token",
)


def laid_out(layout: str) -> Batch:
    """Two rows of documents."""
    tokens = torch.randint(3, 97, (2, SEQ + 1), generator=torch.Generator().manual_seed(2))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    if layout == "packed":
        starts[0, [40, 41, 75]] = starts[1, 12] = True
    elif layout == "best fit, odd length":
        tokens, starts = tokens[:, :-5], starts[:, :-5]
        starts[0, [30, 60]] = starts[1, 50] = True
        tokens[0, 80:] = -100
    elif layout == "padding on one process":
        tokens[:, 22:] = -100  # of any number of processes: the first chunk is 48 tokens or fewer
    elif layout == "a document over every border":
        starts[:, [1, SEQ - 1]] = True
    elif layout == "documents of one token":
        starts[0] = True
    return pack(tokens, bos=1, starts=starts)


def build(positions: str, heads: str) -> Llama:
    """Build a small model with weights that are large enough to matter."""
    queries, keys = HEADS[heads]
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=8 * queries,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=queries,
        num_key_value_heads=keys,
    )
    llama = Llama(config, POSITIONS[positions])
    generator = torch.Generator().manual_seed(5)
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.08, generator=generator)
    return llama


Case = tuple[str, str, str, str]
EVERY_CASE: list[Case] = list(product(NAMES, LAYOUTS, POSITIONS, HEADS))


def every_pair() -> list[Case]:
    """Return few cases in which every two values of different settings meet."""
    left = {pair for case in EVERY_CASE for pair in _pairs(case)}
    chosen = []
    while left:
        best = max(EVERY_CASE, key=lambda case: len(left & _pairs(case)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[str, str]]:
    return set(combinations(case, 2))


def whole_gradients(llama: Llama) -> list[torch.Tensor]:
    """Add the gradients of all processes."""
    found = []
    for weight in llama.parameters():
        assert weight.grad is not None
        grad = weight.grad.clone()
        dist.all_reduce(grad)
        found.append(grad)
    return found


def compare(case: Case) -> None:
    """Compare nats, loss and gradients with one process's own."""
    name, layout, positions, heads = case
    if name == "ulysses" and HEADS[heads][0] % dist.get_world_size():
        with pytest.raises(ValueError, match="6 heads do not divide"):
            context_parallel(name, None).check(HEADS[heads][0])
        return
    batch = laid_out(layout)
    plain, spread = build(positions, heads), build(positions, heads)
    loss, nats = plain.loss(batch)
    loss.backward()
    at_once = 1 if layout == "packed" else None
    apply_context_parallel(spread, context_parallel(name, None, at_once))
    part, found = spread.loss(batch)
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(found, nats, atol=3e-6, rtol=0)
    torch.testing.assert_close(total, loss.detach(), atol=0, rtol=2e-6)
    gradients = [weight.grad for weight in plain.parameters()]
    spread_gradients = whole_gradients(spread)
    for mine, own in zip(spread_gradients, gradients, strict=True):
        assert own is not None
        assert (mine - own).abs().max() <= 1e-5 * own.abs().max(), case
    norms = [torch.nn.utils.get_total_norm(each) for each in (spread_gradients, gradients)]
    torch.testing.assert_close(*norms, atol=0, rtol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(spread(batch), nats, atol=3e-6, rtol=0)
        assert torch.equal(spread.top1_correct(batch)[1], plain.top1_correct(batch)[1])


def perturb(name: str) -> None:
    """Change one token: hidden states move from its own position on, in its own document only."""
    if name == "ulysses" and HEADS["GQA"][0] % dist.get_world_size():
        return
    llama = build("RoPE", "GQA")
    context = context_parallel(name, None)
    batch = laid_out("packed")
    changed = batch.input_ids.clone()
    changed[0, 50] += 1
    hidden = []
    for ids in (batch.input_ids, changed):
        share = context.share(batch._replace(input_ids=ids))
        hidden.append(llama.hidden(share.batch, share.source))
    moved = context.join((hidden[0] != hidden[1]).any(-1), share.columns, SEQ)
    expected = torch.zeros_like(moved)
    expected[0, 50:75] = True  # documents of row 0: 0–40, 40, 41–75, 75–96
    assert torch.equal(moved, expected)


def under_everything(rank: int) -> None:
    """FSDP2, recomputed and compiled blocks together."""
    batch = laid_out("packed")
    plain = build("YaRN", "GQA")
    plain.loss(batch)[0].backward()
    for name in NAMES:
        spread = build("YaRN", "GQA")
        parallel.apply_compile(spread)
        apply_levers(spread, "block", "block_inputs", mlp_tile_tokens=20)
        apply_context_parallel(spread, context_parallel(name, None, 1))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallel.apply_sharding(spread, mesh, torch.float32)
        spread.loss(batch)[0].backward()
        for weight, own in zip(spread.parameters(), plain.parameters(), strict=True):
            grad = weight.grad.full_tensor() * dist.get_world_size()
            assert (grad - own.grad).abs().max() <= 1e-5 * own.grad.abs().max(), name


def offloaded_weights(rank: int) -> None:
    """Shards in host memory train as those on the device: on a CPU, all but the copies."""
    batch = laid_out("packed")
    trained = []
    for cpu_offload in (False, True):
        llama = build("RoPE", "GQA")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallel.apply_sharding(llama, mesh, torch.float32, cpu_offload)
        groups = [{"params": list(llama.parameters())}]
        optimizer = make_optimizer("adamw_bf16_moments", groups, 0.1, (0.9, 0.95))
        for _ in range(2):
            llama.loss(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([weight.full_tensor() for weight in llama.parameters()])
    for found, expected in zip(*trained, strict=True):
        assert torch.equal(found, expected)


def in_group(rank: int, world: int, port: int, jobs: list[tuple[Callable, Any]]) -> None:
    """Do all jobs in one process group."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for job, argument in jobs:
        job(argument)
    dist.destroy_process_group()


def launch(world: int, jobs: list[tuple[Callable, Any]]) -> None:
    """Start so many processes once for all jobs; every process must succeed."""
    forks, port = multiprocessing.get_context("forkserver"), runs.free_port()
    forks.set_forkserver_preload(runs.PRELOADED)
    ranks = [forks.Process(target=in_group, args=(r, world, port, jobs)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(1000)
    assert [rank.exitcode for rank in ranks] == [0] * world


def jobs(cases: list[Case]) -> list[tuple[Callable, Any]]:
    return [*((compare, case) for case in cases), *((perturb, name) for name in NAMES)]


@pytest.mark.slow
def test_two_processes_share_rows_as_one_would_have_them():
    launch(2, jobs(every_pair()))


@pytest.mark.slow
def test_two_processes_share_every_kind_of_row():
    launch(2, [*jobs(EVERY_CASE), (under_everything, 0), (offloaded_weights, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4, 8])
def test_more_processes_share_rows_as_one_would_have_them(world: int):
    launch(world, jobs(every_pair()))


# ---- a model of real size


def as_transformers(name: str) -> None:
    """Compare nats of SmolLM2's shape, random weights, with those of transformers' logits."""
    import transformers

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    shape |= {"vocab_size": 2048, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Llama(LlamaConfig(**shape, tie_word_embeddings=True, rms_norm_eps=1e-5), RoPE())
    ours.load_state_dict(theirs.state_dict(), strict=False)
    apply_context_parallel(ours, context_parallel(name, None))
    tokens = torch.randint(3, 2048, (1, 385), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [130, 131]] = True
    batch = pack(tokens, bos=1, starts=starts)
    with torch.no_grad():
        nats = ours(batch)[0]
        for begin, end in ((0, 130), (131, 384)):
            logits = theirs(tokens[:, begin:end]).logits[0]
            expected = torch.nn.functional.cross_entropy(
                logits, batch.labels[0, begin:end], reduction="none", ignore_index=-100
            )
            torch.testing.assert_close(nats[begin:end], expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_three_processes_give_the_nats_of_transformers():
    launch(3, [(as_transformers, name) for name in NAMES])


def test_chunks_are_divided_by_what_they_have_to_see():
    for processes in (2, 3, 8):
        whole = [2 * i + 1.0 for i in range(2 * processes)]  # one document
        numbers, busiest = balanced(whole, processes)
        assert sorted(numbers) == [[r, 2 * processes - 1 - r] for r in range(processes)]
        assert busiest == 1
    half = [float(i + 1) for i in range(8)] + [1.0] * 8  # one document, then many short ones
    assert balanced(half, 4)[1] <= 1.1 < balanced(half[:4] + [1.0] * 4, 4)[1]


@pytest.mark.gpu
def test_one_process_on_a_gpu_gives_what_it_gives_without_context_parallelism():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in NAMES:
            plain, spread = (build("YaRN", "GQA").cuda() for _ in range(2))
            apply_context_parallel(spread, context_parallel(name, None))
            rows = laid_out("packed")
            documents = rows.documents
            moved = (each.cuda() if isinstance(each, torch.Tensor) else each for each in documents)
            batch = Batch(*(each.cuda() for each in rows[:-1]), type(documents)(*moved))
            for llama in (plain, spread):
                llama.loss(batch)[0].backward()
            for mine, own in zip(spread.parameters(), plain.parameters(), strict=True):
                assert (mine.grad - own.grad).abs().max() <= 1e-5 * own.grad.abs().max()
    finally:
        dist.destroy_process_group()


# ---- training


def shared_by(size: int, *more: Any) -> list[Any]:
    strategy = "--trainer.strategy"
    return [f"{strategy}.context_parallel_size", size, *more]


def check_trained_as_one(ran: runs.Ran, per_row: int) -> None:
    """Compare a run with that of one process: samples, losses, norms, validation, weights."""
    one, found = (runs.witnessed(folder) for folder in (runs.alone().folder, ran.folder))
    for rows, expected in zip(runs.samples(found), runs.samples(one), strict=True):
        assert sorted(rows) == sorted(expected * per_row)
    for name in ("loss", "grad_norm", "lr", "tokens"):
        values = [[getattr(e[step], name) for step in sorted(e)] for e in (found, one)]
        assert runs.largest_difference(*values) <= 2e-6, name
    start = load_pretrained(runs.alone().folder / "checkpoints" / "step-00000010").state_dict()
    end, own = (load_pretrained(f).state_dict() for f in (ran.folder, runs.alone().folder))
    for name, weight in own.items():  # twenty steps lie between
        assert (end[name] - weight).norm() <= 1e-4 * (weight - start[name]).norm(), name
    expected = runs.scalars(runs.alone().folder)
    for name, values in runs.scalars(ran.folder).items():
        if name.startswith("val/"):
            pairs = [[value for _, value in tags] for tags in (values, expected[name])]
            assert runs.largest_difference(*pairs) <= 2e-6, name


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows_as_one(tmp_path):
    ran = runs.fit(tmp_path, *shared_by(2), ranks=2).succeeded()
    assert "zigzag over 2 processes; the busiest does" in ran.out
    check_trained_as_one(ran, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_rows_shards_and_replicas_divide_the_processes(ranks: int, tmp_path):
    replicas = ["--trainer.strategy.replicate_size", 2]
    ulysses = ["--trainer.strategy.context_parallel", "ulysses"] if ranks == 4 else []
    options = [*shared_by(2), *replicas, *ulysses]
    ran = runs.fit(tmp_path, *options, "--data.init_args.micro_batch_size", 2, ranks=ranks)
    check_trained_as_one(ran.succeeded(), 2)


@pytest.mark.slow
def test_a_run_goes_on_with_other_sizes(tmp_path):
    sizes = [(8, 4, 2, 6), (2, 2, 1, 12), (1, 1, 1, 18), (4, 2, 2, 30)]
    micro = ["--data.init_args.micro_batch_size", 2, "--checkpoints.every_n_steps", 6]
    seen: dict[int, Any] = {}
    for ranks, context, replicas, until in sizes:
        last = ["--ckpt_path", "last"] if seen else []
        options = [*shared_by(context), "--trainer.strategy.replicate_size", replicas, *last]
        stop = ["--trainer.callbacks+", json.dumps(_stop_after(until))]
        runs.fit(tmp_path, *options, *micro, *stop, ranks=ranks).succeeded()
        for file in tmp_path.glob("witness-*.jsonl"):
            seen |= dict(_steps(file.read_text().splitlines()))
            file.unlink()
    one = runs.witnessed(runs.alone().folder)
    assert sorted(seen) == sorted(one)
    losses = [seen[step] for step in sorted(seen)], runs.losses(one)
    assert runs.largest_difference(*losses) <= 1e-6


def _stop_after(step: int) -> dict[str, Any]:
    return {"class_path": "training.runs.StopAfter", "init_args": {"step": step}}


def _steps(lines: list[str]) -> Iterator[tuple[int, float]]:
    for entry in map(json.loads, lines):
        if "step" in entry:
            yield entry["step"], entry["loss"]


@pytest.mark.slow
def test_a_memory_needs_whole_rows(tmp_path):
    options = ["--model.init_args.memory", 1, "--data.init_args.contiguous", "true"]
    ran = runs.fit(tmp_path, *shared_by(2), *options, ranks=2)
    assert ran.code == 1
    assert "a memory needs whole rows" in ran.err


def test_heads_and_processes_must_divide(tmp_path):
    ran = runs.fit(tmp_path, *shared_by(2), ranks=1)
    assert "1 processes do not divide by context_parallel_size 2" in ran.err


def test_slurm_says_how_many_nodes_and_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    told = {"SLURM_NNODES": "2", "SLURM_NTASKS": "16", "SLURM_JOB_NAME": "long"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    trainer = SimpleNamespace(devices="auto", num_nodes=1)
    fill_in_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == (8, 2)
