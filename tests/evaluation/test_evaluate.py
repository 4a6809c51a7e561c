"""The table of `evaluate` against a loop over the held-out tokens, read without our own reader."""

import json
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from training import runs

from lit_longctx.batch import Batch
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.decoding import reading
from lit_longctx.evaluation.evaluate import evaluate
from lit_longctx.evaluation.loss.held_out import HeldOutLoss, LossRows
from lit_longctx.evaluation.loss.sliding import SlidingWindow
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import NoPE, PositionInterpolation, RoPE, TransformerXL, YaRN

WINDOW, WINDOWS = 512, 4
EDGES = [0, 128, 256, 512]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
CONFIG = LlamaConfig(
    vocab_size=258,
    num_hidden_layers=2,
    max_position_embeddings=256,
    bos_token_id=256,
    eos_token_id=257,
    **SHAPE,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two prepared folders with documents shorter and longer than a window."""
    folder = tmp_path_factory.mktemp("data")
    short = runs.documents(seed=3, number=120)
    long = [" ".join(runs.documents(seed=4 + i, number=4)) for i in range(40)]
    return [
        str(runs.prepare(folder / name, texts))
        for name, texts in (("short", short), ("long", long))
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Llama]:
    """Two models by the Hugging Face folder they are stored in."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, theta, seed in (("short_context", 1e4, 0), ("long_context", 1e5, 1)):
        torch.manual_seed(seed)
        llama = Llama(CONFIG, RoPE(theta)).eval()
        found[str(export_pretrained(llama, folder / name))] = llama
    return found


@pytest.fixture(scope="module")
def result(
    models: dict[str, Llama], data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("evaluation") / "both"
    found = evaluate(list(models), data, str(output), window=WINDOW, windows=WINDOWS, device="cpu")
    return found, output


def held_out_tokens(folder: str) -> Tensor:
    """Return the held-out stream, from litdata's files: count, offsets, then the tokens."""
    split = Path(folder) / "held_out"
    parts = []
    for number in range(len(list(split.glob("*.bin")))):
        content = (split / f"chunk-0-{number}.bin").read_bytes()
        items, begin, end = struct.unpack("<3I", content[:12])
        assert (items, end) == (1, len(content))
        parts.append(np.frombuffer(content[begin:end], np.uint16))
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@torch.no_grad()
def nats_by_place(llama: Any, folder: str) -> list[tuple[int, float, int]]:
    """(place, nats, document's length) of every target in evenly spread windows."""
    stream = held_out_tokens(folder)
    last = (len(stream) - 1) // WINDOW - 1
    found = []
    for i in range(WINDOWS):
        begin = round(last * i / (WINDOWS - 1)) * WINDOW
        window = stream[begin : begin + WINDOW + 1]
        starts = sorted({0, *(window[:-1] == 256).nonzero().flatten().tolist()})
        for start, end in zip(starts, [*starts[1:], WINDOW], strict=True):
            document = window[start : end + 1]
            nats = -llama.logits(reading(document[None, :-1]))[0].log_softmax(-1)
            for place, token in enumerate(document[1:].tolist()):
                if token != 256:
                    found.append((place, float(nats[place, token]), end - start))
    return found


def test_numbers_are_those_of_a_loop_over_the_held_out_tokens(
    result: tuple[dict[str, Any], Path], models: dict[str, Llama], data: list[str]
):
    found, _ = result
    assert found["edges"] == EDGES
    assert set(found["loss"]) == set(models)
    means = {}
    for name, llama in models.items():
        tokens = [pair for folder in data for pair in nats_by_place(llama, folder)]
        buckets = [
            [nats for place, nats, _ in tokens if low <= place < high]
            for low, high in pairwise(EDGES)
        ]
        assert found["targets"] == [len(bucket) for bucket in buckets]
        means[name] = [sum(bucket) / len(bucket) for bucket in buckets]
        assert found["loss"][name] == pytest.approx(means[name], rel=1e-5)
        mean = sum(nats for _, nats, _ in tokens) / len(tokens)
        assert found["overall"][name] == pytest.approx(mean, rel=1e-5)
        for source, folder in zip(("short", "long"), data, strict=True):
            of = [nats for place, nats, _ in nats_by_place(llama, folder) if place >= 256]
            value = found["loss_by_source"][name][source][2]
            assert value == pytest.approx(sum(of) / len(of), rel=1e-5)
        for number, (low, high) in enumerate(pairwise([*EDGES, 10_000])):
            of = [n for place, n, size in tokens if low <= size < high and place < 128]
            value = found["loss_by_length"][name][number][0]
            assert value == pytest.approx(sum(of) / len(of), rel=1e-5)
    before, after = (means[name] for name in models)
    number = found["targets"]
    inside = sum((b - a) * n for b, a, n in zip(before[:2], after[:2], number[:2], strict=True))
    ((_, gain),) = found["gain"].items()
    assert gain["inside"][0] == pytest.approx(inside / sum(number[:2]), abs=1e-5)
    assert gain["beyond"][0] == pytest.approx(before[2] - after[2], abs=1e-5)
    assert gain["beyond"][1] <= gain["beyond"][0] <= gain["beyond"][2]


def test_rows_of_long_documents_begin_where_those_begin(models, data, tmp_path):
    name, llama = next(iter(models.items()))
    rows = LossRows(long_documents=True, edges=[200, 300, WINDOW])
    options = {"window": WINDOW, "windows": 3, "loss": rows, "device": "cpu"}
    found = evaluate([name], data[1:], str(tmp_path / "long"), **options)
    stream = held_out_tokens(data[1])
    starts = (stream == 256).nonzero().flatten().tolist()
    long = [a for a, b in zip(starts, [*starts[1:], len(stream)], strict=True) if b - a > WINDOW]
    assert len(long) > 3
    chosen = [long[0], long[round((len(long) - 1) / 2)], long[-1]]
    with torch.no_grad():
        logits = llama.logits(reading(torch.stack([stream[at : at + WINDOW] for at in chosen])))
    targets = torch.stack([stream[at + 1 : at + WINDOW + 1] for at in chosen])
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = [float(nats[:, low:high].mean()) for low, high in pairwise([0, 200, 300, WINDOW])]
    assert found["loss"][name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("edges", [[0, WINDOW], [300, 200, WINDOW], [128]])
def test_edges_that_do_not_rise_to_the_window_are_refused(models, data, tmp_path, edges):
    with pytest.raises(ValueError, match="rise from above 0 to the window of 512"):
        evaluate(list(models), data, str(tmp_path), window=WINDOW, loss=LossRows(edges=edges))


class Theirs(NamedTuple):
    """A model of transformers, asked as ours is."""

    model: Any

    def logits(self, batch: Batch) -> Tensor:
        return self.model(batch.input_ids).logits


def test_other_positions_stand_beside_the_checkpoints_own(
    result: tuple[dict[str, Any], Path], models: dict[str, Llama], data: list[str], tmp_path: Path
):
    """Against transformers, which is given the same weights under another config."""
    folder, _ = models
    schemes = {
        "yarn": YaRN(theta=1e4, factor=4.0, original_context=256),
        "linear": PositionInterpolation(theta=1e4, factor=2.0),
    }
    how = {"window": WINDOW, "windows": WINDOWS, "device": "cpu"}
    found = evaluate([folder], data, str(tmp_path), positions=list(schemes.values()), **how)
    own, *others = found["loss"]
    assert own == folder
    assert found["loss"][own] == result[0]["loss"][folder]
    settings = {"rope_theta": 1e4, "original_max_position_embeddings": 256}
    for column, (kind, scheme) in zip(others, schemes.items(), strict=True):
        assert column.startswith(f"{folder} {type(scheme).__name__}(")
        config = transformers.LlamaConfig.from_pretrained(folder)
        config.rope_parameters = {**settings, "rope_type": kind, "factor": scheme.factor}
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, config=config)
        tokens = [pair for each in data for pair in nats_by_place(Theirs(theirs), each)]
        mean = sum(nats for _, nats, _ in tokens) / len(tokens)
        assert found["overall"][column] == pytest.approx(mean, rel=1e-5)
        assert abs(found["overall"][column] - found["overall"][own]) > 1e-5
    table = (tmp_path / "loss_by_position.md").read_text().splitlines()[0]
    assert all(f"| {column} |" in table for column in (own, *others))


def test_a_scheme_whose_weights_are_not_there_is_refused(
    models: dict[str, Llama], data: list[str], tmp_path: Path
):
    with pytest.raises(ValueError, match=r"TransformerXL has weights .* train it first"):
        evaluate([*models], data, str(tmp_path), window=WINDOW, positions=[TransformerXL()])
    with pytest.raises(ValueError, match=r"two columns would be named .* NoPE\(\)"):
        evaluate([*models], data, str(tmp_path), window=WINDOW, positions=[NoPE(), NoPE()])


def test_files_hold_what_was_returned(result: tuple[dict[str, Any], Path]):
    found, output = result
    assert json.loads((output / "results.json").read_text()) == found
    table = (output / "loss_by_position.md").read_text()
    for name, values in found["loss"].items():
        assert name in table
        assert all(f"{value:.4f}" in table for value in values)
    assert f"| 128–256 | {found['targets'][1]:,.0f} |" in table
    png = (output / "loss_by_position.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 1000


def test_a_second_look_finds_the_same_numbers(
    result: tuple[dict[str, Any], Path], models: dict[str, Llama], data: list[str], tmp_path: Path
):
    again = evaluate(
        list(models), data, str(tmp_path / "again"), window=WINDOW, windows=WINDOWS, device="cpu"
    )
    assert again == result[0]


def test_places_that_no_document_reaches_are_null_in_the_file(
    models: dict[str, Llama], data: list[str], tmp_path: Path
):
    short, _ = data
    name = next(iter(models))
    found = evaluate([name], [short], str(tmp_path), window=1024, windows=2, device="cpu")
    assert found["loss"][name][-1] is None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert stored["loss"][name][-1] is None
    assert stored["targets"][-1] == 0


@pytest.mark.parametrize("window", [256, 512])
def test_where_nothing_lies_beyond_the_trained_length_no_gain_is_told(
    window: int, models: dict[str, Llama], tmp_path: Path
):
    texts = [text[:200] for text in runs.documents(seed=5, number=120)]
    data = runs.prepare(tmp_path / "brief", texts)
    output = tmp_path / "evaluation"
    found = evaluate(list(models), [str(data)], str(output), window=window, windows=2, device="cpu")
    assert [list(parts) for parts in found["gain"].values()] == [["inside"]]
    assert "beyond" not in (output / "loss_by_position.md").read_text()


def test_folders_of_the_same_name_are_refused(
    models: dict[str, Llama], data: list[str], tmp_path: Path
):
    other = shutil.copytree(data[1], tmp_path / "short")
    with pytest.raises(ValueError, match="two data folders are named short"):
        evaluate(list(models), [data[0], str(other)], str(tmp_path / "out"), window=WINDOW)
    assert not (tmp_path / "out").exists()


def test_a_model_with_fewer_tokens_than_the_data_is_refused(data: list[str], tmp_path: Path):
    llama = Llama(LlamaConfig(vocab_size=200, num_hidden_layers=1, **SHAPE), RoPE())
    folder = export_pretrained(llama, tmp_path / "small")
    with pytest.raises(ValueError, match=r"vocabulary of 258, larger than .* 200"):
        evaluate([str(folder)], data, str(tmp_path / "out"), window=WINDOW)


def test_a_split_shorter_than_the_window_is_refused(models: dict[str, Llama], tmp_path: Path):
    tiny = runs.prepare(tmp_path / "tiny", runs.documents(seed=9, number=8), held_out=0.5)
    with pytest.raises(ValueError, match="held-out split of tiny is shorter than a window of 4096"):
        evaluate(list(models), [str(tiny)], str(tmp_path / "out"), window=4096)


def test_a_stopped_evaluation_goes_on_where_it_was(
    result: tuple[dict[str, Any], Path],
    models: dict[str, Llama],
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Stopped in the middle of the second checkpoint, its last line torn."""
    asked = []
    real = HeldOutLoss.measure

    def measure(self: HeldOutLoss, llama: Llama, unit: dict[str, Any]) -> Any:
        if len(asked) == 11:
            raise KeyboardInterrupt
        asked.append((llama.position, unit["source"], unit["at"]))
        return real(self, llama, unit)

    monkeypatch.setattr(HeldOutLoss, "measure", measure)
    both = {"window": WINDOW, "windows": WINDOWS, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(list(models), data, str(tmp_path), **both)
    assert not (tmp_path / "results.json").exists()
    kept = tmp_path / "measurements.jsonl"
    kept.write_bytes(kept.read_bytes()[:-20])
    before, asked[:] = asked[:10], []
    assert evaluate(list(models), data, str(tmp_path), **both) == result[0]
    assert len(before) + len(asked) == len(set(before + asked)) == 4 * WINDOWS


@pytest.mark.slow
def test_what_is_known_is_not_measured_again_but_what_has_changed_is(
    models: dict[str, Llama], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = str(tmp_path / "changing")
    both = {"window": WINDOW, "windows": WINDOWS, "device": "cpu"}
    first, second = models.values()

    def measured() -> float:
        found = evaluate([folder], data, str(tmp_path / "out"), **both)
        return found["overall"][folder]

    export_pretrained(first, folder)
    before = measured()
    assert "values are in" not in capsys.readouterr().out
    assert measured() == before
    assert "8 of 8 values are in" in capsys.readouterr().out
    shutil.rmtree(folder)
    export_pretrained(second, folder)
    assert measured() != before
    assert "values are in" not in capsys.readouterr().out


def test_an_altered_line_is_named(models: dict[str, Llama], data: list[str], tmp_path: Path):
    (tmp_path / "measurements.jsonl").write_text('{"of": {}, "value": 1}\n{"of": 3\n')
    with pytest.raises(ValueError, match=r"measurements.jsonl is altered: line 2 holds no"):
        evaluate(list(models), data, str(tmp_path), window=WINDOW)


@pytest.mark.slow
def test_sliding_perplexity_of_whole_documents(
    models: dict[str, Llama], data: list[str], tmp_path: Path
):
    """Against a loop that reads each target with the tokens its window holds."""
    folder, llama = next(iter(models.items()))
    how = SlidingWindow([256, 512], 128, documents=2, tokens=512, bos="document")
    found = evaluate([folder], data[1:], str(tmp_path), ["perplexity"], sliding=how, device="cpu")
    stream = held_out_tokens(data[1])
    begins = (stream == 256).nonzero().flatten().tolist()
    ends = (stream == 257).nonzero().flatten().tolist()
    long = [begin for begin, end in zip(begins, ends, strict=False) if end - begin >= 511]
    nats = []
    for document in (stream[begin : begin + 512] for begin in (long[0], long[-1])):
        for t in range(1, 512):
            first = 0 if t < 256 else (t - 256) // 128 * 128 + 128
            logits = llama.logits(reading(document[None, first:t]))[0, -1]
            nats.append(-float(logits.log_softmax(-1)[document[t]]))
    value = found["perplexity"][folder]["long"]["256"]
    assert value["token"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    assert value["bits_per_byte"] == pytest.approx(np.mean(nats) / np.log(2), rel=2e-3)
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    # the curve of YaRN's script with --truncate: each window reads the beginning of a document
    how = SlidingWindow([256, 512], 128, documents=2, tokens=512, truncate=True)
    cut = evaluate([folder], data[1:], str(tmp_path), ["perplexity"], sliding=how, device="cpu")
    nats = []
    for row in (stream[begin : begin + 256] for begin in (long[0], long[-1])):
        logits = llama.logits(reading(row[None]))[0, :-1].log_softmax(-1)
        nats.append(-logits.gather(1, row[1:, None]))
    expected = float(torch.cat(nats).mean().exp())
    assert cut["perplexity"][folder]["long"]["256"]["token"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"no held-out document of short has 4096 tokens; .* has"):
        evaluate([folder], data[:1], str(tmp_path), ["perplexity"], device="cpu")


def spread(ranks: int, result: tuple[dict[str, Any], Path], data: list[str], *more: Any) -> None:
    """Measure again on several processes, and compare with what one found."""
    expected, output = result
    output = output.with_name(f"on {ranks}")
    options = ["--device", "cpu", "--window", WINDOW, "--windows", WINDOWS]
    options += ["--checkpoint", json.dumps(list(expected["loss"])), "--data", json.dumps(data)]
    options += ["--output", output, "--context_parallel_size", 2, *more]
    runs.run("evaluate", *options, ranks=ranks).succeeded()
    found = json.loads((output / "results.json").read_text())
    for name, losses in expected["loss"].items():
        assert runs.largest_difference(found["loss"][name], losses) <= 2e-6


@pytest.mark.slow
def test_processes_share_rows(result: tuple[dict[str, Any], Path], data: list[str]):
    spread(2, result, data)


@pytest.mark.slow
def test_groups_of_processes_take_units_of_their_own(
    result: tuple[dict[str, Any], Path], data: list[str]
):
    probes = [
        "--tasks",
        '["loss", "needle"]',
        "--grid.lengths",
        "[384]",
        "--grid.answers",
        "teacher_forced",
    ]
    spread(4, result, data, "--context_parallel", "ulysses", *probes)


def test_processes_that_do_not_divide_are_refused(
    result: tuple[dict[str, Any], Path], data: list[str], tmp_path: Path
):
    with pytest.raises(ValueError, match="1 processes do not divide by context_parallel_size 2"):
        evaluate(list(result[0]["loss"]), data, str(tmp_path), context_parallel_size=2)
