"""Length upsampling: shares, documents and the report, counted again from what was written."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_longctx import cli, manifest
from lit_longctx.data.making.mixture import Upsampling, mix
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.store.windows import Windows

BOS = 256
THRESHOLD = 300
SOURCES = {"web": (400, 0.85), "books": (40, 0.1), "code": (120, 0.5)}
"""Documents of each source, and the share of them that is short."""


def write(folder, name, number, short):
    generator = np.random.default_rng(len(name))
    rows = []
    for i in range(number):
        low, high = (5, 250) if generator.random() < short else (400, 2500)
        letters = generator.integers(97, 123, generator.integers(low, high))
        rows.append({"id": f"{name} {i}", "text": bytes(letters.tolist()).decode()})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, (number, short) in SOURCES.items():
        path = write(folder, name, number, short)
        prepare(str(path), str(folder / name), held_out=0.1, chunk_tokens=4096)
    return {name: str(folder / name) for name in SOURCES}


def documents(folder, split="train"):
    """Documents of a split, cut at BOS; the BOS that fill the last block are none."""
    windows = Windows(folder, split, 256)
    tokens = windows.read(0, windows.tokens)
    parts = np.split(tokens, np.flatnonzero(tokens == BOS))[1:]
    return [part.tobytes() for part in parts if len(part) > 1]


def lengths(found):
    return np.array([len(document) // 8 for document in found])


def shares(folders):
    tokens = {name: int(lengths(documents(folder)).sum()) for name, folder in folders.items()}
    return {name: n / sum(tokens.values()) for name, n in tokens.items()}, tokens


def mixed(sources, tmp_path, **settings):
    settings = {"threshold": THRESHOLD, **settings}
    report = mix(sources, str(tmp_path / "mix"), Upsampling(**settings))
    return {name: str(tmp_path / "mix" / name) for name in sources}, report


def long_share(folder):
    each = lengths(documents(folder))
    return each[each >= THRESHOLD].sum() / each.sum()


def test_none_keeps_everything(sources, tmp_path):
    found, _ = mixed(sources, tmp_path, mode="none")
    for name in sources:
        assert documents(found[name]) == documents(sources[name])


def test_per_source_keeps_shares_to_a_document_and_raises_the_long_within_each(sources, tmp_path):
    found, report = mixed(sources, tmp_path, mode="per_source")
    before, _ = shares(sources)
    _, after = shares(found)
    longest = {name: lengths(documents(folder)).max() for name, folder in sources.items()}
    total = min(after[name] / before[name] for name in sources)
    for name in sources:
        assert 0 <= after[name] - before[name] * total <= sum(longest.values()), name
        assert long_share(found[name]) > long_share(sources[name]), name
        assert report["sources"][name]["passes"] == 1
        taken, held = Counter(documents(found[name])), Counter(documents(sources[name]))
        assert taken <= held
    # the source that sets the total gives all its long documents and a tenth of the short ones
    scarce = min(sources, key=lambda n: after[n] / before[n])
    each = lengths(documents(sources[scarce]))
    kept = lengths(documents(found[scarce]))
    assert (kept >= THRESHOLD).sum() >= (each >= THRESHOLD).sum() - 1


def test_global_drops_short_documents_and_lets_shares_move(sources, tmp_path):
    found, _ = mixed(sources, tmp_path, mode="global")
    short = kept = 0
    for name in sources:
        each, left = lengths(documents(sources[name])), lengths(documents(found[name]))
        assert (left >= THRESHOLD).sum() == (each >= THRESHOLD).sum()
        short += (each < THRESHOLD).sum()
        kept += (left < THRESHOLD).sum()
    assert abs(kept - 0.1 * short) < 4 * (short * 0.1 * 0.9) ** 0.5
    before, after = shares(sources)[0], shares(found)[0]
    assert after["books"] > before["books"]
    assert after["web"] < before["web"]


@pytest.mark.slow
def test_named_sources_are_raised_and_short_documents_filtered(sources, tmp_path):
    """As `upsample_code_arxiv_book` of Fu et al.'s code, which drops short documents too."""
    found, _ = mixed(sources, tmp_path, mode="upsample", shares={"books": 0.6})
    before, (after, tokens) = shares(sources)[0], shares(found)
    total = before["web"] + before["code"] + 0.6
    expected = {"web": before["web"] / total, "books": 0.6 / total, "code": before["code"] / total}
    for name, share in expected.items():
        assert after[name] == pytest.approx(share, abs=2500 / sum(tokens.values())), name
    assert long_share(found["web"]) > long_share(sources["web"]) + 0.15
    found, _ = mixed(sources, tmp_path / "all", mode="upsample", shares={"books": 0.6}, keep=1.0)
    assert long_share(found["web"]) == pytest.approx(long_share(sources["web"]), abs=0.15)


@pytest.mark.slow
def test_a_larger_budget_repeats_documents_pass_by_pass(sources, tmp_path):
    _, tokens = shares(sources)
    asked = 2 * sum(tokens.values())
    found, report = mixed(sources, tmp_path, mode="per_source", tokens=asked)
    for name, folder in found.items():
        assert lengths(documents(folder)).sum() - 2 * tokens[name] in range(2500), name
        copies = Counter(documents(folder))
        assert max(copies.values()) <= report["sources"][name]["passes"]
        each = [d for d in documents(sources[name]) if len(d) // 8 >= THRESHOLD]
        assert min(copies[d] for d in each) >= report["sources"][name]["passes"] - 1
        assert (
            f"{report['sources'][name]['passes']} passes"
            in (tmp_path / "mix/report.txt").read_text()
        )


def test_a_smaller_budget_takes_some(sources, tmp_path):
    _, tokens = shares(sources)
    found, _ = mixed(sources, tmp_path, mode="none", tokens=sum(tokens.values()) // 4)
    for name, folder in found.items():
        assert lengths(documents(folder)).sum() - tokens[name] / 4 == pytest.approx(1250, abs=1251)


def test_the_report_counts_what_was_written(sources, tmp_path):
    found, report = mixed(sources, tmp_path, mode="per_source")
    assert json.loads((tmp_path / "mix" / "report.json").read_text()) == report
    assert (tmp_path / "mix" / "report.png").read_bytes().startswith(b"\x89PNG")
    for name in sources:
        before, after = (Counter(documents(f[name])) for f in (sources, found))
        for bucket in report["sources"][name]["buckets"]:
            edges = [0, *(2**i for i in range(10, 21)), 2**40]
            low = bucket["from_tokens"]
            high = edges[edges.index(low) + 1]
            here = [d for d in before if low <= len(d) // 8 < high]
            assert bucket["documents_before"] == sum(before[d] for d in here)
            assert bucket["documents_after"] == sum(after[d] for d in here)
            assert bucket["tokens_after"] == sum(after[d] * len(d) // 8 for d in here)
            assert bucket["kept"] == sum(d in after for d in here)
            assert bucket["kept"] + bucket["dropped"] == bucket["documents_before"]
        written = manifest.verify(tmp_path / "mix" / name)
        assert written["splits"]["train"]["documents"] == after.total()
        assert written["mixed"]["settings"]["mode"] == "per_source"


def test_held_out_documents_and_the_tokenizer_are_copied(sources, tmp_path):
    found, _ = mixed(sources, tmp_path, mode="global")
    for name in sources:
        assert documents(found[name], "held_out") == documents(sources[name], "held_out")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            theirs, ours = (Path(f[name], "tokenizer", file) for f in (sources, found))
            assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("threshold", [300, 1024, 1500])
def test_long_shares_are_those_of_the_threshold(sources, tmp_path, threshold):
    _, report = mixed(sources, tmp_path, mode="global", threshold=threshold)
    for name in sources:
        for when, folder in (("before", sources[name]), ("after", tmp_path / "mix" / name)):
            each = lengths(documents(folder))
            expected = each[each >= threshold].sum() / each.sum()
            assert report["sources"][name][f"long_{when}"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_source_at_a_url_is_copied_whole(sources, tmp_path):
    remote = {name: f"local:{folder}" for name, folder in sources.items()}
    mix(remote, str(tmp_path / "mix"), Upsampling("none"))
    for name, folder in sources.items():
        ours, theirs = (manifest.verify(Path(f)) for f in (tmp_path / "mix" / name, folder))
        assert ours["splits"]["held_out"] == theirs["splits"]["held_out"]
        found = documents(tmp_path / "mix" / name, "held_out")
        assert found == documents(folder, "held_out")
        assert (tmp_path / "mix" / name / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_mix_and_another_another(sources, tmp_path):
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folders, _ = mixed(sources, tmp_path / name, mode="global", seed=seed)
        found[name] = [documents(folder) for folder in folders.values()]
    assert found["a"] == found["b"] != found["c"]


def test_from_the_command_line_and_into_training(sources, tmp_path, capsys):
    config = tmp_path / "mix.yaml"
    settings = {"mode": "per_source", "threshold": THRESHOLD}
    content = {"sources": sources, "output": str(tmp_path / "mix"), "upsampling": settings}
    weights = {"web": 0.5, "books": 0.3, "code": 0.2}
    config.write_text(yaml.safe_dump({**content, "weights": weights}))
    assert cli.main(["mix", "--config", str(config)]) == 0
    assert "of its own in long ones" in capsys.readouterr().out
    data = yaml.safe_load((tmp_path / "mix" / "data.yaml").read_text())["data"]
    assert data["class_path"] == "PretrainData"
    found = data["init_args"]["sources"]
    assert {name: source["weight"] for name, source in found.items()} == weights
    assert {name: source["folder"] for name, source in found.items()} == {
        name: str(tmp_path / "mix" / name) for name in sources
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "keep 1.5 is no share"),
        ({"mode": "upsample"}, "shares go with mode upsample"),
        ({"shares": {"books": 0.6}}, "shares go with mode upsample"),
        ({"tokens": 0}, "tokens 0 must be 1 or more"),
        ({"mode": "upsample", "shares": {"boks": 0.6}}, "shares name boks; sources are web"),
        ({"threshold": 10**6, "keep": 0.0}, "source web has no document left; raise keep"),
        (
            {"mode": "global", "threshold": 10**6, "keep": 0.0},
            "source web has no document left; raise keep",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(sources, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        mixed(sources, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_weights_must_name_the_sources(sources, tmp_path):
    with pytest.raises(ValueError, match="weights must name the sources web, books, code"):
        mix(sources, str(tmp_path / "mix"), weights={"web": 1.0})
