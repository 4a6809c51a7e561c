"""What a task asks, and what a metric gives, under the version that stands in result caches.

Where one of these fails, output has changed: raise that task's or metric's `version`, so that no
value measured by older code is taken for one of the new, and record the new output here.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from training import runs

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.sampling.conversations import Conversations
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.evaluation import candidates
from lit_longctx.evaluation.loss.held_out import HeldOutLoss
from lit_longctx.evaluation.loss.longppl import KeyTokens, LongPPL
from lit_longctx.evaluation.loss.sliding import SlidingWindow, SlidingWindowPerplexity
from lit_longctx.evaluation.retrieval.answers import Answers
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.registry import TASKS
from lit_longctx.evaluation.retrieval.tasks import Needle
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

WORDS = [
    "river",
    "stone",
    "cloud",
    "garden",
    "winter",
    "market",
    "silver",
    "morning",
    "forest",
    "window",
]

TASKS_RECORDED: dict[str, tuple[int, str]] = {
    "passkey": (1, "e06a34fae5e6776f"),
    "needle": (1, "2bfaf0e9a4cf6e53"),
    "first_sentence": (1, "6e9534da54e95334"),
    "multi_key": (1, "283a3243d328135c"),
    "multi_value": (1, "c354b57c984ffd8a"),
    "multi_query": (1, "c9ad510f24812cbd"),
    "variable_tracking": (1, "e52d7c3df9838257"),
    "common_words": (1, "acf1fd71c1401e30"),
    "frequent_words": (1, "dbbb179bf56f6d66"),
    "key_values": (1, "a9c2ddd4a675329a"),
    "helmet_json_kv": (1, "9869e7c934ebd5eb"),
    "helmet_niah_mk_2": (1, "28016076cbf37b1b"),
    "helmet_niah_mk_3": (1, "131d3aa91f2a63f9"),
    "helmet_niah_mv": (1, "da7c18ba56a084d9"),
    "needle, fu": (1, "7577bc4fea6e18f5"),
}
"""Version, and hash of prompts, answers and scores."""
METRICS_RECORDED: dict[str, tuple[int, list[float]]] = {
    "loss": (
        1,
        [
            0,
            0,
            169.3162,
            23,
            1,
            0,
            817.1682,
            128,
            1,
            1,
            687.4656,
            104,
            2,
            0,
            788.4079,
            128,
            2,
            1,
            805.9056,
            128,
        ],
    ),
    "perplexity": (1, [6.3716, 6.2768, 6.1308, 127, 64, 64, 255, 6.4603, 255, 255]),
    "longppl": (1, [255, 1661.0166, 192, 1225.7093]),
    "answers": (1, [0, 5.6469, 0, 5.5574]),
}
"""Version, and numbers that a tiny model gives."""


def recorded(name: str) -> tuple[int, Any]:
    version, numbers = METRICS_RECORDED[name]
    return version, pytest.approx(numbers, rel=1e-4)


def haystack() -> Haystack:
    choose = random.Random(0).choices
    sentences = [" ".join(choose(WORDS, k=8)).capitalize() + "." for _ in range(300)]
    return Haystack(ByteTokenizer(), [" ".join(sentences)])


ASKED = {name: task() for name, task in TASKS.items()} | {"needle, fu": Needle("fu")}


@pytest.mark.parametrize("name", ASKED)
def test_a_task_asks_and_scores_what_its_version_did(name: str):
    task, hay, told = ASKED[name], haystack(), []
    for depth in (0.0, 75.0):
        for seed in (0, 3):
            sample = task.sample(hay, 3000, depth, seed)
            right = " ".join(sample.references)
            said = [right, right.upper(), right[: len(right) // 2], "", "7", "I do not know."]
            scores = [round(task.score(sample, each), 9) for each in said]
            ids = [sample.prompt_ids.tolist(), sample.answer_ids.tolist()]
            told.append([ids, sample.references, scores])
    found = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    assert (task.version, found) == TASKS_RECORDED[name]


@pytest.fixture(scope="module")
def llama() -> Llama:
    """Weights without a random generator, which need not be the same in every version of torch."""
    llama = Llama(LlamaConfig(258, 16, 32, 2, 2), RoPE()).eval()
    with torch.no_grad():
        for number, parameter in enumerate(llama.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = (places * (1.7 + number) + number).sin().view_as(parameter)
            parameter.copy_(wave + (parameter.ndim == 1))
    return llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def test_the_loss_is_what_its_version_measured(folder: Path, llama: Llama):
    data = runs.prepare(folder / "loss", runs.documents(seed=7, number=60))
    loss = HeldOutLoss({"loss": Windows(data, "held_out", 256)}, 2)
    found = [loss.measure(llama, item) for item in loss.eval_items()]
    numbers = [number for cells in found for number in chain(*cells)]
    assert (loss.version, numbers) == recorded("loss")


def test_perplexity_is_what_its_version_measured(folder: Path, llama: Llama):
    data = runs.prepare(folder / "perplexity", runs.documents(seed=7, number=60))
    how = SlidingWindow([128, 256], 64, documents=1, tokens=256)
    sliding = SlidingWindowPerplexity({"p": Windows(data, "held_out", 256)}, how)
    found = [sliding.measure(llama, item) for item in sliding.eval_items()]
    numbers = [n for each in found for n in (*each["means"], *each["targets"], each["bytes"])]
    assert (sliding.version, numbers) == recorded("perplexity")


def test_longppl_is_what_its_version_measured(folder: Path, llama: Llama):
    data = runs.prepare(folder / "longppl", runs.documents(seed=7, number=60))
    how = KeyTokens(truncated_context=64, stride=64, documents=1, tokens=256)
    longppl = LongPPL({"longppl": Windows(data, "held_out", 256)}, how)
    found = [longppl.measure(llama, item) for item in longppl.eval_items()]
    numbers = [n for each in found for nats in each.values() for n in (len(nats), sum(nats))]
    assert (longppl.version, numbers) == recorded("longppl")


def test_answers_are_what_their_version_measured(folder: Path, llama: Llama):
    rows = [{"instruction": f"What is {i}?", "output": f"A number, {i}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(folder / "rows.jsonl")], str(folder / "chats"), chat=True, held_out=0.3)
    answers = Answers({"chats": Conversations(str(folder / "chats"), "held_out", 256)}, 2, False)
    found = [answers.measure(llama, item) for item in answers.eval_items()]
    numbers = [number for each in found for number in (each["exact"], each["nats"])]
    assert (answers.version, numbers) == recorded("answers")


# ---- position schemes know their code

SCHEME = '''
from dataclasses import dataclass
from lit_longctx.position import RoPE
{comment}
@dataclass(frozen=True)
class Mine(RoPE):
    """A scheme of the user's own."""
    @property
    def attention_factor(self):
        return {factor}
'''


def test_an_edited_scheme_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)

    def code(factor: float, comment: str = "") -> str:
        (tmp_path / "mine.py").write_text(SCHEME.format(factor=factor, comment=comment))
        monkeypatch.delitem(candidates.sys.modules, "mine", raising=False)
        candidates.inspect.linecache.clearcache()
        import mine

        return candidates.code_of([mine.Mine()])

    first = code(1.0)
    assert first == code(1.0, "# a remark")
    assert first != code(1.5)
    assert first != candidates.code_of([RoPE()])
    assert candidates.code_of([RoPE(1e4)]) == candidates.code_of([RoPE(5e5)])


@dataclass(frozen=True)
class Here(RoPE):
    """A scheme in a file."""


def test_a_scheme_without_a_file_is_always_new(monkeypatch: pytest.MonkeyPatch):
    def refuse(module: Any) -> str:
        raise OSError("source code not available")

    assert candidates.code_of([Here()]) == candidates.code_of([Here()])
    monkeypatch.setattr(candidates.inspect, "getsource", refuse)
    assert candidates.code_of([Here()]) != candidates.code_of([Here()])
