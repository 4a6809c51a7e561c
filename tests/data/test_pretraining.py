import json
import random
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from thorough import thorough

from lit_longctx.batch import Batch, Documents, StepBatch
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source, read_batch
from lit_longctx.data.sampling.steps import Steps

BOS, EOS = 256, 257
WINDOW, ROWS, STEPS = 256, 8, 30
NAMES = ["books", "code"]
WEIGHTS = [3, 1]


def make(folder, name, documents, held_out=0.0):
    """Prepare random documents; the flat stream of each split, token by token."""
    generator = random.Random(name)
    texts = {
        f"{name} {i}": generator.choices("abcdefgh", k=generator.randint(1, 700)) for i in documents
    }
    rows = folder / f"{name}.jsonl"
    lines = [json.dumps({"id": key, "text": "".join(text)}) + "\n" for key, text in texts.items()]
    rows.write_text("".join(lines))
    prepare([str(rows)], str(folder / name), held_out=held_out, chunk_tokens=1024)


def flat(folder, split):
    """A split's tokens, read without litdata from chunk files of one item each."""
    tokens = []
    for i in range(len(list((folder / split).glob("*.bin")))):
        content = (folder / split / f"chunk-0-{i}.bin").read_bytes()
        tokens += memoryview(content)[12:].cast("H").tolist()
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretraining")
    make(path, "books", range(150), held_out=0.1)
    make(path, "code", range(40), held_out=0.3)
    make(path, "nothing held out", range(20))
    return path


def data(folder, rows=ROWS, names=NAMES, weights=WEIGHTS, **settings):
    given = zip(names, weights or [None] * len(names), strict=True)
    sources = {name: Source(str(folder / name), weight) for name, weight in given}
    return PretrainData(sources, WINDOW, rows * WINDOW, **settings)


def first_order(module):
    return Steps(module, 0, 1).orders[0]


def attach(module, rank=0, ranks=1, step=0, consumed=0, max_steps=STEPS, distributed_sampler=False):
    """Give a data module what it reads of Lightning's Trainer."""
    module.trainer = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        max_steps=max_steps,
        global_step=step,
        strategy=None,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=distributed_sampler),
    )
    module.samples_consumed = consumed
    return module


def rows_of(batch):
    """Each row of a micro-batch as (sample, source, tokens), the last target left out."""
    columns = (batch.samples.tolist(), batch.sources.tolist(), batch.input_ids.tolist())
    return [
        (sample, source, tuple(tokens)) for sample, source, tokens in zip(*columns, strict=True)
    ]


def run(folder, ranks=1, rows=ROWS, step=0, consumed=0, **settings):
    """What all ranks together read: per step, the rows in order of the ranks."""
    steps = {}
    for rank in range(ranks):
        module = attach(data(folder, rows, **settings), rank, ranks, step, consumed)
        loader = module.train_dataloader()
        assert len(loader) == STEPS
        for number, found in enumerate(loader, step):
            size = settings.get("micro_batch_size", 1)
            mine = rows // ranks
            sizes = [size] * (mine // size) or [mine]
            assert [len(b.input_ids) for b in found.micro_batches] == sizes
            assert found.next_sample == consumed + (number - step + 1) * rows
            read = [row for batch in found.micro_batches for row in rows_of(batch)]
            steps.setdefault(number, []).extend(read)
    assert list(steps) == list(range(step, STEPS))
    return [row for number in steps for row in steps[number]]


@pytest.fixture(scope="module")
def reference(folder):
    return run(folder)


def test_every_row_is_a_window_of_its_source(folder, reference):
    assert [sample for sample, *_ in reference] == list(range(STEPS * ROWS))
    for number, name in enumerate(NAMES):
        stream = flat(folder / name, "train")
        windows = [tuple(stream[k : k + WINDOW]) for k in range(0, len(stream) - WINDOW, WINDOW)]
        assert len(set(windows)) == len(windows)
        drawn = [tokens for _, source, tokens in reference if source == number]
        assert len(drawn) == STEPS * ROWS * WEIGHTS[number] // sum(WEIGHTS)
        for begin in range(0, len(drawn), len(windows)):
            epoch = drawn[begin : begin + len(windows)]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(windows)
            assert len(epoch) < len(windows) or set(epoch) == set(windows)
    assert len(drawn) > len(windows)


def test_every_prefix_holds_each_source_s_share(reference):
    taken = [0, 0]
    for n, (_, source, _) in enumerate(reference, 1):
        taken[source] += 1
        assert all(abs(taken[i] - n * WEIGHTS[i] / 4) < 1 for i in range(2))


def long_run(folder, ranks, num_workers, packing):
    """Sample, source and tokens of every row of 500 steps of 4 windows, over all ranks."""
    steps = {}
    for rank in range(ranks):
        settings = {"num_workers": num_workers, "packing": packing}
        module = attach(data(folder, 4, **settings), rank, ranks, max_steps=500)
        for number, found in enumerate(module.train_dataloader()):
            rows = [row for batch in found.micro_batches for row in rows_of(batch)]
            steps.setdefault(number, []).extend(rows)
    return [row for number in steps for row in steps[number]]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_500_steps_are_one_sequence_on_1_2_4_processes_with_0_1_2_workers(folder, packing):
    expected = long_run(folder, 1, 0, packing)
    assert [sample for sample, *_ in expected] == list(range(2000))
    taken = [0, 0]
    for n, (_, source, _) in enumerate(expected, 1):
        taken[source] += 1
        assert all(abs(taken[i] - n * WEIGHTS[i] / 4) < 1 for i in range(2))
    books = [tokens for _, source, tokens in expected if source == 0]
    epoch = len(set(books))
    assert len(books) > 3 * epoch
    assert set(books[:epoch]) == set(books[epoch : 2 * epoch])
    assert books[:epoch] != books[epoch : 2 * epoch]
    every = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 1, 2)]
    for ranks, workers in thorough(every, [(1, 2), (2, 1), (4, 0)]):
        assert long_run(folder, ranks, workers, packing) == expected, (ranks, workers)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("micro_batch_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_workers_and_micro_batches_read_the_same(
    folder, reference, ranks, micro_batch_size, num_workers
):
    settings = {"micro_batch_size": micro_batch_size, "num_workers": num_workers}
    assert run(folder, ranks, **settings) == reference


def test_rows_that_do_not_fill_the_last_micro_batch(folder, reference):
    module = attach(data(folder, micro_batch_size=3))
    steps = list(module.train_dataloader())
    assert [[len(b.input_ids) for b in step.micro_batches] for step in steps] == [[3, 3, 2]] * STEPS
    found = [row for step in steps for batch in step.micro_batches for row in rows_of(batch)]
    assert found == reference


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("step", "ranks", "settings"),
    [
        (1, 1, {}),
        (7, 1, {"num_workers": 2}),
        (7, 2, {"num_workers": 1, "micro_batch_size": 2}),
        (7, 4, {"micro_batch_size": 2}),
        (29, 1, {}),
        (30, 2, {}),
    ],
)
def test_a_resume_reads_what_is_left(folder, reference, step, ranks, settings):
    found = run(folder, ranks, step=step, consumed=step * ROWS, **settings)
    assert found == reference[step * ROWS :]


@pytest.mark.parametrize("rows", [2, 4, 16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_another_batch_size_goes_on_at_the_right_sample(folder, reference, rows, ranks):
    found = run(folder, ranks, rows=rows, step=20, consumed=20 * ROWS)
    assert [sample for sample, *_ in found] == list(range(160, 160 + 10 * rows))
    assert found[:80] == reference[160 : 160 + len(found)][:80]


def test_a_trained_module_without_a_counter_begins_at_the_first_sample(folder, reference):
    module = data(folder)
    assert module.samples_consumed == 0
    attach(module)
    step = next(iter(module.train_dataloader()))
    assert [row for batch in step.micro_batches for row in rows_of(batch)] == reference[:ROWS]


def test_seeds_differ_and_epochs_have_no_end(folder, reference):
    other = run(folder, seed=1)
    assert [row[:2] for row in other] == [row[:2] for row in reference]
    assert sum(a == b for a, b in zip(other, reference, strict=True)) < len(reference) / 4
    far = attach(data(folder), step=STEPS - 1, consumed=10**9)
    step = next(iter(far.train_dataloader()))
    assert [int(b.samples) for b in step.micro_batches] == list(range(10**9, 10**9 + ROWS))


def test_a_step_is_packed_batches(folder):
    step = next(iter(attach(data(folder, micro_batch_size=2, num_workers=2)).train_dataloader()))
    assert isinstance(step, StepBatch)
    stream = {i: flat(folder / name, "train") for i, name in enumerate(NAMES)}
    for batch in step.micro_batches:
        assert isinstance(batch, Batch)
        assert isinstance(batch.documents, Documents)
        assert isinstance(batch.documents.longest, int)
        for row in range(2):
            tokens = batch.input_ids[row].tolist()
            source = stream[int(batch.sources[row])]
            begins = range(0, len(source), WINDOW)
            k = next(k for k in begins if source[k : k + WINDOW] == tokens)
            following = source[k + 1 : k + WINDOW + 1]
            labels = [-100 if token == BOS else token for token in following]
            assert batch.labels[row].tolist() == labels
            assert batch.loss_weights[row].tolist() == [float(label >= 0) for label in labels]


def test_without_weights_an_epoch_is_every_window_once(folder):
    module = data(folder, weights=None)
    counts = {name: len(windows) for name, windows in module.open("train", module.longest).items()}
    for name, count in counts.items():
        assert count == (len(flat(folder / name, "train")) - 1) // WINDOW
    order = first_order(module)
    drawn = Counter(order(n) for n in range(sum(counts.values())))
    assert drawn == dict.fromkeys(
        ((i, w) for i, n in enumerate(NAMES) for w in range(counts[n])), 1
    )


def test_shuffling_is_local_to_groups_of_four_chunks(folder):
    module = data(folder, names=["books"], weights=None)
    count = len(module.open("train", module.longest)["books"])
    order = first_order(module)
    drawn = [order(n)[1] // 16 for n in range(count)]
    runs = [group for i, group in enumerate(drawn) if i == 0 or drawn[i - 1] != group]
    assert sorted(runs) == list(range(-(-count // 16)))


def held_out_rows(folder, ranks, **settings):
    """Per rank, its micro-batches."""
    found = []
    for rank in range(ranks):
        loader = attach(data(folder, **settings), rank, ranks).val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        found.append(batches)
    return found


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (1, {"held_out_windows": 5, "micro_batch_size": 3}),
        (2, {"held_out_windows": 7, "num_workers": 2}),
        (2, {"held_out_windows": 1, "micro_batch_size": 4}),
        (4, {"held_out_windows": 10**6, "micro_batch_size": 2}),
        (4, {"held_out_windows": 1}),
        (4, {"names": ["nothing held out", *NAMES], "weights": None, "held_out_windows": 3}),
    ],
)
def test_every_held_out_window_is_read_once_over_all_ranks(folder, ranks, settings):
    ours = held_out_rows(folder, ranks, **settings)
    assert len({len(batches) for batches in ours}) == 1
    size = settings.get("micro_batch_size", 1)
    assert {len(batch.input_ids) for batches in ours for batch in batches} == {size}

    expected = []
    for number, name in enumerate(settings.get("names", NAMES)):
        stream = flat(folder / name, "held_out")
        count = max(0, len(stream) - 1) // WINDOW
        chosen = min(count, settings.get("held_out_windows", 32))
        for i in range(chosen):
            k = WINDOW * round(Fraction(count - 1, max(1, chosen - 1)) * i)
            expected.append((i, number, tuple(stream[k : k + WINDOW])))
    assert len(expected) > 1

    read, padding = [], 0
    for batches in ours:
        for batch in batches:
            for i, row in enumerate(rows_of(batch)):
                targets = int((batch.labels[i] != -100).sum())
                assert int(batch.loss_weights[i].sum()) == targets
                if row[0] < 0:
                    assert targets == 0
                    padding += 1
                else:
                    assert targets > 0
                    read.append(row)
    assert sorted(read) == sorted(expected)
    assert padding == -len(expected) % (ranks * size)


@pytest.mark.parametrize(
    "settings", [{"held_out_windows": 0}, {"names": ["nothing held out"], "weights": None}]
)
def test_nothing_held_out_is_an_empty_loader(folder, settings):
    assert held_out_rows(folder, 2, **settings) == [[], []]


def test_test_reads_what_validate_reads(folder):
    module = attach(data(folder))
    both = [list(loader()) for loader in (module.val_dataloader, module.test_dataloader)]
    assert [rows_of(b) for b in both[0]] == [rows_of(b) for b in both[1]]


def test_a_padding_row_among_others(folder):
    module = data(folder)
    readers = dict(enumerate(module.open("train", module.longest).values()))
    batch = read_batch(readers, [(0, 2, 9), (0, -1, -1), (1, 0, 4)], BOS)
    assert batch.samples.tolist() == [9, -1, 4]
    assert batch.sources.tolist() == [0, 0, 1]
    assert (batch.labels[1] == -100).all()
    assert (batch.loss_weights[1] == 0).all()
    assert batch.input_ids[0].tolist() == flat(folder / "books", "train")[512:768]
    assert batch.input_ids[2].tolist() == flat(folder / "code", "train")[:256]
    assert batch.input_ids.dtype == torch.long


def test_sources_of_different_tokenizers_are_refused(folder):
    path = folder / "other"
    if not path.exists():
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        text = (folder / "books/tokenizer/tokenizer.json").read_text()
        (tokenizer / "tokenizer.json").write_text(text)
        names = {"tokenizer": str(tokenizer), "bos": "<bos>", "eos": "<bos>", "held_out": 0}
        prepare([str(folder / "books.jsonl")], str(path), **names)
    with pytest.raises(ValueError, match="source other was prepared with another tokenizer"):
        data(folder, names=["books", "other"])


@pytest.mark.parametrize(("ranks", "rows"), [(3, 8), (4, 2), (2, 1)])
def test_a_world_size_that_does_not_divide_is_refused(folder, ranks, rows):
    module = attach(data(folder, rows), 0, ranks)
    message = f"^{rows} windows per step do not divide among {ranks} processes$"
    with pytest.raises(ValueError, match=message):
        module.train_dataloader()


def test_lightnings_sampler_is_refused_where_it_would_act(folder):
    attach(data(folder), distributed_sampler=True).train_dataloader()
    module = attach(data(folder), ranks=2, distributed_sampler=True)
    with pytest.raises(ValueError, match=r"set Trainer\(use_distributed_sampler=False\)"):
        module.train_dataloader()


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_a_run_without_an_end_is_refused(folder, max_steps):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        attach(data(folder), max_steps=max_steps).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 1000}, "batch_tokens 1000 is no multiple of window 256"),
        ({"batch_tokens": 0}, "must be 1 or more"),
        ({"window": 0}, "must be 1 or more"),
        ({"micro_batch_size": 0}, "must be 1 or more"),
        ({"held_out_windows": -1}, "held_out_windows -1 must be 0 or more"),
        ({"window": 100, "batch_tokens": 100}, "window 100 is no multiple of the block"),
        ({"window": 2048, "batch_tokens": 2048}, r"prepare with --chunk_tokens 2048 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainData(
            {"books": Source(str(folder / "books"))},
            **{"window": 256, "batch_tokens": 512, **settings},
        )


@pytest.mark.parametrize("weights", [[1, None], [None, 1]])
def test_weights_for_some_sources_only_are_refused(folder, weights):
    with pytest.raises(ValueError, match="sources need a weight each, or none of them one"):
        data(folder, weights=weights)


def test_no_source_is_refused():
    with pytest.raises(ValueError, match="there must be a source"):
        PretrainData({})


@pytest.mark.parametrize("weights", [[1, 0], [1, -2]])
def test_a_source_without_weight_is_refused(folder, weights):
    with pytest.raises(ValueError, match="every weight must be above 0"):
        attach(data(folder, weights=weights)).train_dataloader()


def test_a_source_shorter_than_a_window_is_refused(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}')
    prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "short"), held_out=0)
    sources = {"books": Source(str(folder / "books")), "short": Source(str(tmp_path / "short"))}
    module = attach(PretrainData(sources, WINDOW, WINDOW))
    message = "^source short holds 256 train tokens, less than a window of 256$"
    with pytest.raises(ValueError, match=message):
        module.train_dataloader()
