"""Which of the papers' orderings show at this size: schemes untrained, trained, and fine-tuning.

    python benchmarks/study_extension.py --budget cpu --output benchmarks/results/study_cpu2_DATE.md

From the repository's root, after `make quickstart`, `make sft_quickstart` and the first commands of
`make real`. Part a
reads SmolLM2-135M at 16,384 tokens, untrained; parts b and c train the quickstart's byte-level
model, from 512 tokens, once for every arm and seed. A seed decides the order of the training data;
the start is one model. Stopped at any point, or by --minutes, the same command goes on; the report
says what was not reached. What to expect is written in EXPECTED, before it is run.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import transformers

from lit_longctx.cli import main as lit_longctx

REAL, BYTES = "checkpoints/smollm2", "runs/quickstart_short"
FOLDER = Path("runs/study")
EDGES = [128, 1024, 2048, 4096, 8192, 10240, 12288, 14336, 16384]
Scheme = dict[str, Any]


def scheme(name: str, **settings: Any) -> Scheme:
    return {"class_path": name, "init_args": settings}


FACTORS = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
UNTRAINED = [
    scheme("PositionInterpolation", factor=2),
    scheme("NTKAware", factor=2),
    scheme("DynamicNTK", factor=2),
    scheme("YaRN", factor=2),
    scheme("LongRoPE", factor=2, **FACTORS),
    scheme("RoPE", theta=5e5),
    scheme("RoPE", theta=1e6),
    scheme("XPos"),
]
TRAINED = {
    "RoPE": scheme("RoPE", theta=1e4),
    "ABF": scheme("RoPE", theta=8e4),
    "PI": scheme("PositionInterpolation", factor=8),
    "YaRN": scheme("YaRN", factor=8),
    "NTK": scheme("NTKAware", factor=8),
}
INPUT_LOSS = ["0", "0.5", "1"]


class Expected(NamedTuple):
    """Of two arms, the paper's better one comes first."""

    better: str
    worse: str
    source: str


EXPECTED = {
    "b": [
        Expected("ABF", "RoPE", "Xiong et al. 2023, table 5"),
        Expected("ABF", "PI", "Xiong et al. 2023, table 5"),
        Expected("PI", "RoPE", "Xiong et al. 2023, table 5"),
        Expected("YaRN", "PI", "Peng et al. 2023"),
    ],
    "c": [Expected("input loss 1", "input loss 0", "Xiong et al. 2023, fine-tuning")],
}
NOT_HERE = [
    "documents masked or not (`document_mask`): no arm for it yet",
    "per-source length upsampling, long data only: of the standard library's bytes nearly all are "
    "in long documents already",
]
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""97.5 % quantile of Student's t by number of seeds."""


class Interval(NamedTuple):
    """Mean difference over seeds, and half its 95 % interval."""

    mean: float
    half: float


def paired(one: list[float], other: list[float]) -> Interval:
    """Return the mean of `one` less `other`, seed by seed, with Student's t interval."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return Interval(mean(differences), float("nan"))
    half = T95[len(differences)] * stdev(differences) / len(differences) ** 0.5
    return Interval(mean(differences), half)


def call(verb: str, *options: str) -> None:
    if lit_longctx([verb, *options]):
        raise SystemExit(f"{verb} failed")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# ---- a: a real model, untrained


def untrained(position: Scheme | None) -> None:
    """Measure one scheme; None is the model's own. Values of earlier ones are kept."""
    positions = UNTRAINED[: UNTRAINED.index(position) + 1] if position else []
    common = [
        f"--checkpoint=[{REAL}]",
        "--data=[data/real]",
        f"--positions={json.dumps(positions)}",
    ]
    rows = {"long_documents": True, "edges": EDGES}
    call(
        "evaluate",
        *common,
        f"--output={FOLDER / 'a'}",
        f"--window={EDGES[-1]}",
        "--windows=3",
        f"--loss={json.dumps(rows)}",
    )
    grid = {"lengths": [1024, 4096, 8192], "depths": [0, 50, 100], "samples": 1}
    needles = [f"--output={FOLDER / 'a_needles'}", "--tasks=[needle]", f"--grid={json.dumps(grid)}"]
    call("evaluate", *common, *needles)


def report_untrained() -> Iterator[str]:
    """Yield tables of what was measured."""
    yield "## a. SmolLM2-135M, 8,192 tokens, untrained: nats per token, difference to its own RoPE"
    for name in ("a/loss_by_position", "a_needles/needle"):
        file = FOLDER / f"{name}.md"
        yield file.read_text().strip() if file.is_file() else f"{name}: not reached"


# ---- b and c: a byte-level model, trained


def folder(part: str, arm: str, seed: int) -> Path:
    return FOLDER / part / f"{arm.replace(' ', '_')}_{seed}"


def train(part: str, arm: str, seed: int) -> None:
    """Train one arm with one seed, unless it was; a stopped run goes on."""
    run = folder(part, arm, seed)
    if (run / "done").is_file():
        return
    options = [f"--data.init_args.seed={seed}", f"--trainer.default_root_dir={run}"]
    if part == "b":
        options.append(f"--model.init_args.position={json.dumps(TRAINED[arm])}")
    else:
        options.append(f"--data.init_args.input_loss={arm.split()[-1]}")
    config = {"b": "config/quickstart.yaml", "c": "config/sft_quickstart.yaml"}[part]
    call("fit", f"--config={config}", *options, "--ckpt_path=last")
    (run / "done").touch()


def trained(part: str, arms: list[str], seeds: int) -> dict[str, list[float]]:
    """Return the measure of each arm that all seeds were trained of: nats, by seed."""
    whole = [
        arm for arm in arms if all((folder(part, arm, s) / "done").is_file() for s in range(seeds))
    ]
    if not whole:
        return {}
    names = {arm: [str(folder(part, arm, seed)) for seed in range(seeds)] for arm in whole}
    runs = json.dumps([BYTES, *(name for each in names.values() for name in each)])
    output = FOLDER / f"{part}_evaluation"
    config = {"b": "config/quickstart_evaluate.yaml", "c": "config/sft_quickstart_evaluate.yaml"}
    call("evaluate", f"--config={config[part]}", f"--checkpoint={runs}", f"--output={output}")
    found = results(output)
    measure = beyond if part == "b" else answers
    return {"before": [measure(found, BYTES)] * seeds} | {
        arm: [measure(found, name) for name in each] for arm, each in names.items()
    }


def beyond(found: dict[str, Any], name: str) -> float:
    """Nats per token at positions from 512 on."""
    cells = zip(pairwise(found["edges"]), found["loss"][name], found["targets"], strict=True)
    far = [(loss, targets) for (low, _), loss, targets in cells if low >= 512]
    return sum(loss * n for loss, n in far) / sum(n for _, n in far)


def answers(found: dict[str, Any], name: str) -> float:
    """Nats per token of held-out answers."""
    by_source = found["answers"]["nats"][name]
    return sum(by_source.values()) / len(by_source)


def report_trained(part: str, title: str, arms: list[str], seeds: int) -> Iterator[str]:
    """Yield a table of arms, and of each expected ordering whether it shows."""
    yield title
    values = trained(part, arms, seeds)
    if missing := [arm for arm in arms if arm not in values]:
        yield f"not reached: {', '.join(missing)}"
    if not values:
        return
    lines = ["| arm | mean over seeds | minus before [95 %] |", "|---|---|---|"]
    for arm, each in values.items():
        difference = paired(each, values["before"])
        lines.append(f"| {arm} | {mean(each):.4f} | {told(difference)} |")
    yield "\n".join(lines)
    lines = ["| expected better | than | source | nats saved [95 %] | shows |", "|---" * 5 + "|"]
    for better, worse, source in EXPECTED[part]:
        if better in values and worse in values:
            found = paired(values[worse], values[better])
            lines.append(f"| {better} | {worse} | {source} | {told(found)} | {shows(found)} |")
    yield "\n".join(lines)


def told(found: Interval) -> str:
    return f"{found.mean:+.4f} ± {found.half:.4f}"


def shows(found: Interval) -> str:
    """Whether a difference that is expected above 0 is."""
    if not abs(found.mean) > found.half:
        return "not told apart"
    return "yes" if found.mean > 0 else "no: the other way round"


# ---- all


def units(parts: str, seeds: int) -> Iterator[Callable[[], None]]:
    """Yield what is run, the cheapest part of the budget that decides most first."""
    for part, arms in (("b", list(TRAINED)), ("c", [f"input loss {x}" for x in INPUT_LOSS])):
        for arm in arms if part in parts else []:
            for seed in range(seeds):
                yield partial(train, part, arm, seed)
    for position in (None, *UNTRAINED) if "a" in parts else []:
        yield partial(untrained, position)


def report(seeds: int, minutes: float) -> Iterator[str]:
    """Yield the report's paragraphs."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    yield (
        f"# Orderings of schemes and recipes: commit {commit.stdout.strip()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()} with "
        f"{torch.get_num_threads()} threads, {seeds} seeds, {minutes:.0f} minutes in this call"
    )
    yield from report_untrained()
    title = "## b. Byte-level model, 512 → 4,096 tokens, half a million tokens: nats beyond 512"
    yield from report_trained("b", title, list(TRAINED), seeds)
    title = "## c. The same, fine-tuned on questions at 2,048 tokens: nats per token of answers"
    yield from report_trained("c", title, [f"input loss {x}" for x in INPUT_LOSS], seeds)
    yield "Not in this budget:\n\n" + "\n".join(f"- {line}" for line in NOT_HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", choices=["cpu"], default="cpu", help="size of the study")
    parser.add_argument("--parts", default="abc", help="which are run; all stand in the report")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 9), metavar="N")
    parser.add_argument("--minutes", type=float, default=150, help="none is begun after them")
    parser.add_argument("--output", type=Path, default=FOLDER / "study.md")
    options = parser.parse_args()
    begin = time.monotonic()
    for unit in units(options.parts, options.seeds):
        if time.monotonic() - begin > 60 * options.minutes:
            break
        unit()
    text = "\n\n".join(report(options.seeds, (time.monotonic() - begin) / 60))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
