"""Stages: the same samples on any layout, every share at every prefix, an epoch that goes on."""

import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
from data.test_pretraining import NAMES, WINDOW, attach, flat, folder, rows_of  # noqa: F401

from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.sampling.stages import Stage, StageSchedule
from lit_longctx.data.sampling.steps import Steps

STAGES = [
    Stage(steps=12, learning_rate=1e-3),
    Stage(20, window=512, batch_tokens=8 * 512, micro_batch_size=2, theta=5e5, learning_rate=5e-4),
    Stage(8, window=1024, batch_tokens=4 * 1024, weights={"code": 1.0}, learning_rate=1e-4),
]
STEPS = 40


def data(folder, packing="concatenate", stages=STAGES, **settings):  # noqa: F811
    sources = {name: Source(str(folder / name), w) for name, w in zip(NAMES, [3, 1], strict=True)}
    rows = {"batch_tokens": 8 * WINDOW, "micro_batch_size": 4, **settings}
    return PretrainData(sources, WINDOW, packing=packing, stages=stages, **rows)


def run(folder, ranks=1, step=0, consumed=0, **settings):  # noqa: F811
    """What all ranks together read: per step, the rows in order of the ranks."""
    steps = {}
    for rank in range(ranks):
        module = attach(data(folder, **settings), rank, ranks, step, consumed, STEPS)
        for number, found in enumerate(module.train_dataloader(), step):
            rows = [row for batch in found.micro_batches for row in rows_of(batch)]
            steps.setdefault(number, []).extend(rows)
    return steps


@pytest.fixture(scope="module", params=["concatenate", "best_fit"])
def packing(request):
    return request.param


@pytest.fixture(scope="module")
def reference(folder, packing):  # noqa: F811
    return run(folder, packing=packing)


def test_every_stage_has_its_own_window_batch_and_mix(reference):
    assert list(reference) == list(range(STEPS))
    rows = [row for step in reference.values() for row in step]
    assert [sample for sample, *_ in rows] == list(range(12 * 8 + 20 * 8 + 8 * 4))
    for first, last, number, window in ((0, 12, 8, 256), (12, 32, 8, 512), (32, 40, 4, 1024)):
        assert all(len(reference[step]) == number for step in range(first, last))
        assert {len(row[2]) for step in range(first, last) for row in reference[step]} == {window}
        taken = Counter()
        for n, row in enumerate((r for step in range(first, last) for r in reference[step]), 1):
            taken[row[1]] += 1
            expected = {0: n * 3 / 4, 1: n / 4} if first < 32 else {0: 0, 1: n}
            assert all(abs(taken[i] - share) < 1 for i, share in expected.items())


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("ranks", "num_workers"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 0), (4, 0), (1, 2))), (2, 1)],
)
def test_ranks_and_workers_read_the_same(folder, reference, packing, ranks, num_workers):  # noqa: F811
    assert run(folder, ranks, packing=packing, num_workers=num_workers) == reference


@pytest.mark.parametrize("step", [5, 12, 20, 32, 36])
def test_a_resume_in_any_stage_reads_what_was_left(folder, reference, packing, step):  # noqa: F811
    consumed = sum(len(reference[s]) for s in range(step))
    found = run(folder, 2, step, consumed, packing=packing)
    assert found == {s: reference[s] for s in range(step, STEPS)}


@pytest.mark.slow
def test_workers_may_be_started_in_other_ways_than_by_fork(folder, reference, packing):  # noqa: F811
    if packing == "concatenate":
        pytest.skip("starting a process takes seconds; best_fit has all that is to be sent")
    module = attach(data(folder, packing=packing, num_workers=1), step=38, max_steps=STEPS)
    module.samples_consumed = 12 * 8 + 20 * 8 + 6 * 4
    loader = module.train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    found = [[row for batch in step.micro_batches for row in rows_of(batch)] for step in loader]
    assert found == [reference[38], reference[39]]


def test_tokens_count_through_all_stages(folder):  # noqa: F811
    module = attach(data(folder), max_steps=STEPS)
    tokens = [step.next_token for step in module.train_dataloader()]
    expected, total = [], 0
    for number, size in ((12, 8 * 256), (20, 8 * 512), (8, 4 * 1024)):
        for _ in range(number):
            total += size
            expected.append(total)
    assert tokens == expected


def test_a_later_stage_goes_on_in_the_epoch(folder):  # noqa: F811
    """Two stages over one pass of a source: every token is read, few are read twice."""
    stream = flat(folder / "books", "train")
    total = len(stream) // 256
    first = total // 2
    stages = [Stage(first), Stage((total - first) // 2, window=512, batch_tokens=512)]
    sources = {"books": Source(str(folder / "books"))}
    module = PretrainData(sources, 256, 256, stages=stages)
    attach(module, max_steps=sum(stage.steps for stage in stages))
    places = {tuple(stream[i : i + 256]): i // 256 for i in range(0, len(stream) - 255, 256)}
    seen = Counter()
    for step in module.train_dataloader():
        (tokens,) = step.micro_batches[0].input_ids.tolist()
        seen.update(places[tuple(tokens[i : i + 256])] for i in range(0, len(tokens), 256))
    group = 4 * 1024 // 256  # blocks of the chunks that are shuffled together
    assert max(seen.values()) <= 2
    assert total - len(seen) <= group + 2
    assert seen.total() - len(seen) <= group + 2


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("windows", [(256, 512, 1024), (256, 768, 512), (1024, 768, 256)])
def test_sources_go_on_where_they_stopped_whatever_a_stage_reads(folder, packing, windows):  # noqa: F811
    """Three stages; the middle one rests one source, and windows do not divide the groups."""
    mixed, total = {"books": 0.9, "code": 0.1}, len(flat(folder / "books", "train"))
    steps = [int(0.45 * total / (4 * 0.9 * window)) for window in windows]
    stages = [
        Stage(steps[0], window=windows[0], batch_tokens=4 * windows[0], weights=mixed),
        Stage(1, window=windows[1], batch_tokens=windows[1], weights={"code": 1.0}),
        Stage(steps[2], window=windows[2], batch_tokens=4 * windows[2], weights=mixed),
    ]
    module = data(folder, packing, stages=stages, micro_batch_size=1)
    attach(module, max_steps=module.stage_schedule.steps[-1])
    seen = [Counter(), Counter()]
    read = [0, 0]
    for step in module.train_dataloader():
        for batch in step.micro_batches:
            source, tokens = int(batch.sources[0]), batch.input_ids[0].tolist()
            labels = batch.labels[0].tolist()
            # documents are random: eight tokens in a row stand but once in a source
            seen[source].update(
                tuple(tokens[i : i + 8])
                for i in range(len(tokens) - 8)
                if min(labels[i : i + 8]) >= 0
            )
            read[source] += len(tokens)
    orders = Steps(module, 0, 1).orders
    assert [order.keys for order in orders] == [[0, 1], [1], [0, 1]]
    assert len({len(order.groups[-1]) for order in orders}) == 1
    group = 4 * 1024
    for source, name in enumerate(NAMES):
        total = len(flat(folder / name, "train"))
        twice = sum(number - 1 for number in seen[source].values())
        assert 0.5 * total < read[source] < total or name == "code"  # one epoch at most
        assert twice <= group + 2 * max(windows), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [Stage(0)]}, "stages need 1 step or more; got 0"),
        ({"stages": [Stage(5, batch_tokens=300)]}, "batch_tokens 300 is no multiple of window 256"),
        ({"stages": [Stage(5), Stage(5, learning_rate=1.0)]}, "a learning_rate each, or none"),
        ({"stages": [Stage(5, weights={"boks": 1})]}, "names source boks; sources are books"),
        ({"stages": [Stage(5)], "contiguous": True}, "contiguous rows take no stages"),
        (
            {"stages": None, "packing": "best_fit", "contiguous": True},
            "contiguous rows take no stages",
        ),
    ],
)
def test_impossible_stages_are_refused(folder, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        data(folder, **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": -1}, "a stage's micro_batch_size -1 must be 1 or more"),
        ({"batch_tokens": -1024}, "a stage's batch_tokens -1024 must be 1 or more"),
        ({"learning_rate": 0.0}, "a stage's learning_rate 0.0 must be above 0"),
        ({"theta": -1.0}, "a stage's theta -1.0 must be above 0"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Stage(2, **values)


def test_a_stage_need_not_fit_a_source_that_it_does_not_read(folder):  # noqa: F811
    """MDS shards packed to 256 tokens beside a stage of 512."""
    golden = Path(__file__).parents[1] / "golden" / "mds" / "plain"
    packed = Source(str(golden), 1.0, tokenizer="bytes")
    sources = {"books": Source(str(folder / "books"), 1.0), "packed": packed}
    weights = [{"books": 0.5, "packed": 0.5}, {"books": 1.0}]
    stages = [Stage(2, 256, 1024, 1, weights[0]), Stage(2, 512, 1024, 1, weights[1])]
    module = attach(PretrainData(sources, 256, 1024, stages=stages), max_steps=4)
    lengths = [len(s.micro_batches[0].input_ids[0]) for s in module.train_dataloader()]
    assert lengths == [256, 256, 512, 512]
    assert {int(b.sources[0]) for b in module.val_dataloader()} == {0}


def test_held_out_windows_take_the_rows_of_the_longest_stage_by_choice(folder):  # noqa: F811
    stages = [Stage(2, 1024, 2048, 1), Stage(2, 256, 2048, 8)]
    module = attach(data(folder, stages=stages, validation_window="longest"), max_steps=4)
    loader = module.val_dataloader()
    for module.samples_consumed in (0, 4, 20):
        assert {tuple(batch.input_ids.shape) for batch in loader} == {(1, 1024)}
        assert module.description().validation_window == 1024


@pytest.mark.parametrize(("ranks", "num_workers"), [(1, 0), (2, 0), (1, 1)])
def test_held_out_windows_are_those_of_the_stage_being_trained(folder, ranks, num_workers):  # noqa: F811
    """One loader, as Lightning keeps it; after the samples of 0, 1, … steps."""
    module = attach(data(folder, num_workers=num_workers), 0, ranks, max_steps=STEPS)
    loader = module.val_dataloader()
    for consumed, window, rows, sources in (
        (0, 256, 4, {0, 1}),
        (1, 256, 4, {0, 1}),
        (12 * 8, 256, 4, {0, 1}),  # the first stage's last step has just been made
        (12 * 8 + 1, 512, 2, {0, 1}),
        (32 * 8, 512, 2, {0, 1}),
        (32 * 8 + 4, 1024, 4, {1}),
        (10**9, 1024, 4, {1}),
    ):
        module.samples_consumed = consumed
        found = list(loader)
        assert {tuple(batch.input_ids.shape) for batch in found} == {(rows, window)}
        assert {int(s) for b in found for s in b.sources[b.samples >= 0]} == sources
        assert module.description().validation_window == window
        assert len(found) <= len(loader)


def test_the_run_must_be_as_long_as_its_stages(folder):  # noqa: F811
    with pytest.raises(ValueError, match=r"the stages have 40 steps; got trainer\.max_steps 41"):
        attach(data(folder), max_steps=41).train_dataloader()


def test_other_stages_than_the_run_began_with_are_refused(folder):  # noqa: F811
    with pytest.raises(ValueError, match="at step 20 the stages have read 160 samples, the run"):
        attach(data(folder), step=20, consumed=150, max_steps=STEPS).train_dataloader()


def test_a_course_knows_the_stage_of_every_step():
    stage_schedule = StageSchedule([Stage(3, 256, 512), Stage(2, 512, 512)])
    assert [stage_schedule.at(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert [stage_schedule.first_sample(step) for step in range(6)] == [0, 2, 4, 6, 7, 8]
    assert [stage_schedule.tokens(sample, 3) for sample in (6, 7, 8)] == [1536, 2048, 2560]
