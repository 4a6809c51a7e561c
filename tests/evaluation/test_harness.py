"""lm-evaluation-harness on our models: what its own `hf` model says of the exported folder."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import tokenizers
import torch
import torch.distributed.checkpoint as dcp
import yaml
from differences import assert_near
from schemes import every_scheme
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lit_longctx import manifest
from lit_longctx.checkpoint import MODEL, describe, export_pretrained
from lit_longctx.data.tokens.libraries import JsonTokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.model import Llama, LlamaConfig, chosen_device
from lit_longctx.position import PositionScheme, RoPE, TransformerXL, XPos

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from lit_longctx.evaluation import harness
from lit_longctx.evaluation.harness import HarnessModel

CONTEXT = 64
CONFIG = LlamaConfig(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    bos_token_id=0,
    eos_token_id=1,
)
STORY = "the sea was calm and the old ship lay at anchor while the men slept below the deck. "


def tokenizer(folder: Path) -> JsonTokenizer:
    """Train a byte-level BPE whose tokenizer.json puts BOS in front, as Llama's does."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], vocab_size=CONFIG.vocab_size, initial_alphabet=alphabet
    )
    bpe.train_from_iterator([STORY] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    return JsonTokenizer(folder / "tokenizer.json", "<s>", "</s>")


def model(position: PositionScheme, config: LlamaConfig = CONFIG) -> Llama:
    """Return a model whose weights are large enough that the likeliest token stands out."""
    torch.manual_seed(0)
    llama = Llama(config, position)
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return llama


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    return tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, coder: JsonTokenizer) -> str:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    return str(export_pretrained(model(RoPE(theta=100.0)), folder, coder))


@pytest.fixture(scope="module")
def theirs(exported: str):
    return hf(exported)


@pytest.fixture(scope="module")
def ours(exported: str) -> HarnessModel:
    return HarnessModel(exported, batch_size=3)


def hf(folder: str, **options: Any):
    pytest.importorskip("accelerate")  # which lm-eval's hf model needs, and ours does not
    return get_model("hf")(folder, device="cpu", dtype="float32", batch_size=4, **options)


def run_folder(position: PositionScheme, coder: JsonTokenizer, folder: Path) -> str:
    """Write one checkpoint of a run, which can hold every scheme."""
    llama = model(position)
    state = {f"llama.{name}": weight.detach() for name, weight in llama.named_parameters()}
    dcp.save({"state_dict": state}, checkpoint_id=folder, no_dist=True)
    description = describe(llama, CONTEXT)
    (folder / MODEL).write_text(json.dumps(description))
    coder.save(folder)
    manifest.seal(folder, manifest.hash_files(folder))
    return str(folder)


def asked(kind: Any, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def pairs(theirs: Any) -> list[tuple[str, str]]:
    """Contexts with continuations of every kind, among them what the model itself would say."""
    contexts = ["the sea", "", "the old ship \n", "Ünïcode 日本", STORY[:40], STORY * 4]
    continuations = [" was", "s", " calm and the old", " 日本 語", STORY[:60]]
    alone = [context for context in contexts if context]
    likely = theirs.generate_until(
        asked("generate_until", [(context, {"max_gen_toks": 2}) for context in alone]),
        disable_tqdm=True,
    )
    crossed = [(context, text) for context in contexts for text in continuations]
    return crossed + [(c, text) for c, text in zip(alone, likely, strict=True) if text]


def scores(lm: Any, requests: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, list[bool]]:
    found = lm.loglikelihood(asked("loglikelihood", requests), disable_tqdm=True)
    return torch.tensor([score for score, _ in found]), [greedy for _, greedy in found]


# ---- the hf model as oracle


@pytest.mark.parametrize("bos", [True, False])
def test_continuations_score_as_in_the_hf_model(exported: str, theirs: Any, bos: bool):
    oracle = theirs if bos else hf(exported, add_bos_token=False)
    requests = pairs(oracle)
    expected, likeliest = scores(oracle, requests)
    ours = HarnessModel(exported, batch_size=3, add_bos_token=bos)
    found, greedy = scores(ours, requests)
    assert_near("lm-eval, continuations: its hf model", found, expected, rtol=1e-5)
    assert greedy == likeliest
    assert {True, False} == set(greedy)
    assert max(len(ours.tok_encode(context)) for context, _ in requests) > CONTEXT


def test_whole_texts_score_as_in_the_hf_model(theirs: Any, ours: HarnessModel):
    texts = [STORY, STORY * 4, "", "a", "Ünïcode 日本 " * 9, STORY[:30], STORY * 2]
    requests = asked("loglikelihood_rolling", [(text,) for text in texts])
    expected = torch.tensor(theirs.loglikelihood_rolling(requests, disable_tqdm=True))
    found = torch.tensor(ours.loglikelihood_rolling(requests, disable_tqdm=True))
    assert_near("lm-eval, whole texts: its hf model", found, expected, rtol=1e-5)


@pytest.mark.slow
def test_texts_go_on_as_in_the_hf_model(theirs: Any, ours: HarnessModel):
    """Up to each of several stop strings, for prompts of all lengths, in batches."""
    contexts = ["the sea", STORY, "old 日本", STORY * 2, "a", "the men slept below", "calm"]
    free = {"max_gen_toks": 24, "do_sample": False, "num_beams": 1}
    whole = generated(theirs, [(context, free) for context in contexts])
    assert generated(ours, [(context, free) for context in contexts]) == whole
    until = [whole[0][3:5], whole[1][6:7], whole[3][10:12]]
    stopped = [(context, {"until": until, "max_gen_toks": 24}) for context in contexts]
    mixed = stopped + [(context, {"until": until[0], "max_gen_toks": 5}) for context in contexts]
    expected = generated(theirs, mixed)
    assert generated(ours, mixed) == expected
    assert sum(a != b for a, b in zip(expected, whole, strict=False)) > 2


@pytest.mark.slow
def test_what_a_task_does_not_say_is_as_in_the_hf_model(exported: str):
    """256 new tokens, of which the context leaves room for as many; greedy."""
    folder = Path(exported)
    options: dict[str, Any] = {"max_length": 300}
    requests = [("the sea", {"until": ["\n\n"]}), (STORY * 3, {"top_p": 0.9})]
    expected = generated(hf(str(folder), **options), requests)
    assert generated(HarnessModel(exported, **options, batch_size=2), requests) == expected


def generated(lm: Any, requests: Sequence[tuple[str, dict]]) -> list[str]:
    return lm.generate_until(asked("generate_until", requests), disable_tqdm=True)


# ---- tasks

QUESTIONS = ["the sea was", "the old ship lay at", "while the men", "below the", "日本", STORY]


def tasks(folder: Path, answers: Sequence[str]) -> TaskManager:
    """Write a task of each kind, with their data."""
    choices = [" calm", " anchor", " slept below", " deck"]
    asked = {
        "choices": (
            [{"text": q, "choices": choices, "gold": i % 4} for i, q in enumerate(QUESTIONS)],
            {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"},
            ["acc", "acc_norm"],
        ),
        "story": (
            [{"text": "", "gold": q * 5} for q in QUESTIONS],
            {"output_type": "loglikelihood_rolling"},
            ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        ),
        "answers": (
            [{"text": q, "gold": a} for q, a in zip(QUESTIONS, answers, strict=True)],
            {
                "output_type": "generate_until",
                "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 8},
            },
            ["exact_match"],
        ),
    }
    for name, (rows, settings, metrics) in asked.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": metric} for metric in metrics],
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))
    return TaskManager(include_path=str(folder), include_defaults=False)


def said(theirs: Any) -> list[str]:
    """Answers of which every other is what the model says."""
    options = {"until": ["\n", "e"], "max_gen_toks": 8}
    texts = generated(theirs, [(question, options) for question in QUESTIONS])
    return [text if i % 2 else "no" for i, text in enumerate(texts)]


def evaluated(lm: Any, manager: TaskManager, **options: Any) -> dict[str, float]:
    """Results of all tasks by task and metric."""
    found = simple_evaluate(
        lm,
        tasks=["choices", "story", "answers"],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return {
        f"{task} {metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip: a second
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("offline")
def test_tasks_give_the_results_of_the_hf_model(exported: str, theirs: Any, tmp_path: Path):
    manager = tasks(tmp_path, said(theirs))
    expected = evaluated(theirs, manager)
    options = {"pretrained": exported, "dtype": "float32"}
    found = evaluated("lit_longctx", manager, model_args=options, batch_size=4, device="cpu")
    assert found.keys() == expected.keys()
    assert len(found) == 6
    assert 0 < found["answers exact_match,none"] < 1
    values = torch.tensor([list(found.values()), list(expected.values())], dtype=torch.float64)
    assert_near("lm-eval, results of tasks: its hf model", *values, rtol=1e-5)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "position",
    [XPos(), pytest.param(TransformerXL(distance_dim=8), marks=pytest.mark.slow)],
    ids=repr,
)
def test_tasks_run_on_what_hugging_face_cannot_represent(
    position: PositionScheme, coder: JsonTokenizer, tmp_path: Path
):
    folder = run_folder(position, coder, tmp_path / "run")
    manager = tasks(tmp_path, ["no"] * len(QUESTIONS))
    alone, together = (
        evaluated("lit_longctx", manager, model_args=f"pretrained={folder}", batch_size=rows)
        for rows in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert len(together) == 6


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("position", every_scheme(12), ids=lambda p: type(p).__name__)
def test_a_row_answers_in_a_batch_as_alone(
    position: PositionScheme, coder: JsonTokenizer, tmp_path: Path
):
    """Padding is no part of a document, also where a scheme looks at its length."""
    folder = run_folder(position, coder, tmp_path / "run")
    alone, together = (HarnessModel(folder, batch_size=rows) for rows in (1, 8))
    requests = [(STORY[:n], STORY[n : n + m]) for n, m in ((60, 20), (3, 9), (30, 1), (1, 40))]
    found, expected = scores(together, requests), scores(alone, requests)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1] == expected[1]
    texts = [(context, {"max_gen_toks": 12}) for context, _ in requests]
    assert generated(together, texts) == generated(alone, texts)


# ---- chat templates

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system message') }}{% elif message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Writes BOS itself, trims what is said, and refuses system messages."""


@pytest.fixture(scope="module", params=[CHATML, LLAMA2], ids=["chatml", "llama2"])
def chatting(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has special tokens for turns, and a chat template."""
    folder = tmp_path_factory.mktemp("chatting")
    coder = tokenizer(folder / "tokenizer")
    coder.model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    coder.model.save(str(coder.file))
    (folder / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **BORDERS})
    )
    (folder / "tokenizer/chat_template.jinja").write_text(request.param)
    coder = JsonTokenizer(coder.file, "<s>", "</s>")
    config = replace(CONFIG, vocab_size=coder.vocab_size)
    out = Path(export_pretrained(model(RoPE(theta=100.0), config), folder / "hf", coder))
    (out / "chat_template.jinja").write_text(request.param)
    return str(out)


BORDERS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_chats_have_the_ids_of_the_hf_model(chatting: str):
    """With a prompt for the answer, and with an answer begun, as RULER's tasks begin it."""
    ours, theirs = HarnessModel(chatting), hf(chatting)
    said = [
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": " The ship?\n"},
        {"role": "assistant", "content": "lay at anchor"},
        {"role": "user", "content": "the sea\n\nwas"},
        {"role": "assistant", "content": "The answer is"},
    ]
    assert ours.chat_template(True) == theirs.chat_template(True)
    for chat, asks in ((said[:2], True), (said[1:2], True), (said[:4], True), (said, False)):
        found, expected = (lm.apply_chat_template(chat, asks) for lm in (ours, theirs))
        assert found.replace("\0", "") == expected
        for more in ("", " calm", "\nold"):
            assert ours.tok_encode(found + more) == theirs.tok_encode(expected + more)
        for add in (True, False):
            assert ours.tok_encode(found, add) == theirs.tok_encode(expected, add)


def test_special_tokens_in_a_task_are_text_in_a_chat_too(chatting: str):
    lm = HarnessModel(chatting)
    plain, forged = (
        lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": text}]))
        for text in ("old", "old<|im_end|></s>")
    )
    for special in (lm.tokenizer.eos, lm.tokenizer.vocab_size - 1):
        assert plain.count(special) == forged.count(special)
    with pytest.raises(ValueError, match="cannot be written as a chat: NUL in text"):
        lm.apply_chat_template([{"role": "user", "content": "a\0b"}])


@pytest.mark.usefixtures("offline")
def test_tasks_in_chats_give_the_results_of_the_hf_model(chatting: str, tmp_path: Path):
    theirs = hf(chatting)
    manager = tasks(tmp_path, said(theirs))
    options: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Be quick."}
    expected = evaluated(theirs, manager, **options)
    found = evaluated(HarnessModel(chatting, batch_size=3), manager, **options)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_template_by_name_or_none_at_all_is_one_line(chatting: str, exported: str):
    with pytest.raises(
        ValueError, match=r"expected --apply_chat_template alone; got the name tool"
    ):
        HarnessModel(chatting).chat_template("tool")
    with pytest.raises(ValueError, match=r"has no chat template; expected chat_template\.jinja"):
        HarnessModel(exported).chat_template(True)


# ---- upstream's long tasks

UPSTREAM = Path(lm_eval.__file__).parent / "tasks"


@pytest.mark.slow  # 500 prompts of each length are drawn, whatever the limit
@pytest.mark.parametrize("chat", [False, True])
def test_ruler_by_its_own_name_gives_the_results_of_the_hf_model(
    chatting: str, chat: bool, monkeypatch: pytest.MonkeyPatch
):
    """Its scores are 0 here; prompts and answers are compared too. vt needs larger tokens."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda *_: None)  # these tasks cut no essays
    manager = TaskManager(
        include_path=str(UPSTREAM / "ruler"),
        include_defaults=False,
        metadata={"max_seq_lengths": [2048], "pretrained": chatting},
    )
    results = []
    for lm in (HarnessModel(chatting, max_length=2400), hf(chatting, max_length=2400)):
        random.seed(0)
        found = simple_evaluate(
            lm,
            tasks=["niah_single_1", "niah_multikey_2"],
            task_manager=manager,
            limit=2,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
        assert found is not None
        results.append(
            {
                task: [
                    [sample["arguments"][0][0].replace("\0", ""), sample["resps"], sample["2048"]]
                    for sample in samples
                ]
                for task, samples in found["samples"].items()
            }
        )
    assert results[0] == results[1]
    assert [len(samples) for samples in results[0].values()] == [2, 2]


LONGBENCH = {
    "qasper": {"question": "Which ship?", "context": STORY * 3, "answers": ["the old ship"]},
    "lcc": {"question": "", "context": "def sea():\n", "answers": ["    return calm"]},
}


@pytest.mark.usefixtures("offline")
def test_longbench_reads_local_files(exported: str, tmp_path: Path):
    """As docs/how_to/evaluate.md has it: upstream's task, with a file in place of the Hub."""
    pytest.importorskip("fuzzywuzzy")
    for name, row in LONGBENCH.items():
        columns = {"length": 9, "dataset": name, "language": "en", "all_classes": None, "_id": "1"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, **columns}) + "\n")
        described = {
            "include": str(UPSTREAM / f"longbench/{name}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / f"{name}.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(described))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        HarnessModel(exported, max_length=1024),
        tasks=["local_qasper", "local_lcc"],
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=0,
    )
    assert found is not None
    (qasper,), (lcc,) = found["samples"]["local_qasper"], found["samples"]["local_lcc"]
    assert STORY * 3 in qasper["arguments"][0][0]
    assert qasper["arguments"][0][0].endswith("Question: Which ship?\n\nAnswer:")
    assert lcc["arguments"][0][0].endswith("def sea():\nNext line of code:")
    assert 0 <= found["results"]["local_qasper"]["qa_f1_score,none"] <= 1
    assert 0 <= found["results"]["local_lcc"]["code_sim_score,none"] <= 1


# ---- what it costs, and what it says


def test_answers_of_one_token_are_read_once(exported: str):
    lm = HarnessModel(exported)
    read = []
    lm.llama.model.layers[0].register_forward_pre_hook(lambda _, x: read.append(x[0].shape))
    requests = [("the sea", option) for option in (" q", " x", " j", " z")]
    found, _ = scores(lm, requests)
    assert len(read) == 1
    each = [scores(lm, [request])[0] for request in requests]
    torch.testing.assert_close(found, torch.cat(each))


def test_sampling_follows_lm_evals_seed(ours: HarnessModel):
    requests = [("the sea", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0})] * 5
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generated(ours, requests))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5  # in batches of 3 and 2: repeats are draws of their own


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_answers_before_an_interruption_are_kept(
    exported: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With lm-eval's --use_cache, batch by batch."""
    lm = HarnessModel(exported)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    rest: Any = " was calm" if kind == "loglikelihood" else {"max_gen_toks": 1}
    requests = asked(kind, [(STORY[:n], rest) for n in (10, 20, 30)])
    whole = getattr(lm, kind)(requests, disable_tqdm=True)
    cached.dbdict.clear()
    left, hidden = [1, 1], lm.llama.hidden
    monkeypatch.setattr(lm.llama, "hidden", lambda *given: (left.pop(), hidden(*given))[1])
    with pytest.raises(IndexError):
        getattr(cached, kind)(requests)
    assert list(cached.dbdict.values()) == whole[:0:-1]  # longest first


def test_results_name_the_position_scheme(ours: HarnessModel):
    found = ours.get_model_info()
    assert json.loads(json.dumps(found))["position"]["init_args"] == {"theta": 100.0}


def test_the_commands_default_device_is_the_cpu_without_cuda(exported: str):
    assert HarnessModel(exported, device="cuda:0").device.type == chosen_device("auto")


def test_the_models_of_lm_eval_stay_registered():
    """lm-eval fills its registry only where it is empty."""
    assert get_model("lit_longctx") is HarnessModel
    assert get_model("dummy").__module__ == "lm_eval.models.dummy"


@pytest.mark.slow  # the command lists all of lm-eval's own tasks first
def test_the_module_is_the_command_with_our_model(exported: str, tmp_path: Path):
    tasks(tmp_path, ["no"] * len(QUESTIONS))
    command = [sys.executable, "-m", "lit_longctx.evaluation.harness", "run"]
    command += ["--model", "lit_longctx", "--model_args", f"pretrained={exported}"]
    command += ["--tasks", str(tmp_path / "choices.yaml"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|choices|" in done.stdout
    (stored,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(stored.read_text())["config"]["model"] == "lit_longctx"


# ---- errors


def test_without_lm_eval_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    name = "lit_longctx.evaluation.harness"
    monkeypatch.delitem(sys.modules, name)
    for run_as, kind in ((name, ModuleNotFoundError), ("__main__", SystemExit)):
        with pytest.raises(kind, match=r"^the harness needs lm_eval .*'lit_longctx\[eval\]'$"):
            runpy.run_module(name, run_name=run_as)


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path: Path):
    folder = str(export_pretrained(model(RoPE()), tmp_path / "hf"))
    with pytest.raises(ValueError, match="has no tokenizer; pass tokenizer=FOLDER in model_args"):
        HarnessModel(folder)
    assert isinstance(HarnessModel(folder, tokenizer="bytes").tokenizer, ByteTokenizer)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach\n'baber/essays'"), r"fetched \(Couldn't reach 'baber/ess"),
        (requests.exceptions.ProxyError("no route"), r"fetched \(no route\); run it once with a"),
        (LookupError("\n***\n nltk.download('punkt_tab')"), r"fetched \(NLTK's punkt_tab, which"),
        (ValueError("tasks not\nfound"), r"^harness: error: tasks not found$"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_command_says_in_one_line_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
):
    def fail():
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", fail)
    with pytest.raises(SystemExit, match=message) as ended:
        harness.main()
    assert "\n" not in str(ended.value.code)


@pytest.mark.slow  # the command lists all of lm-eval's own tasks first
@pytest.mark.parametrize("task", ["niah_single_2", "ruler_qa_squad", "longbench_qasper"])
def test_a_task_whose_data_cannot_be_fetched_is_one_line(exported: str, task: str, tmp_path: Path):
    command = [sys.executable, "-m", "lit_longctx.evaluation.harness", "run"]
    command += ["--model", "lit_longctx", "--model_args", f"pretrained={exported}"]
    nowhere = {f"{kind}_PROXY": "http://127.0.0.1:9" for kind in ("HTTP", "HTTPS")}
    env = {**os.environ, **nowhere, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--tasks", task], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 1
    assert "harness: error: data of a task cannot be fetched (" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_code_is_refused(chatting: str, name: str, tmp_path: Path):
    """RULER's tasks would run it."""
    folder = Path(shutil.copytree(chatting, tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    known = json.loads((folder / name).read_text())
    known["auto_map"] = {"AutoTokenizer": ["code.Evil", None]}
    (folder / name).write_text(json.dumps(known))
    with pytest.raises(ValueError, match=rf"{name} names code for the tokenizer, which RULER's"):
        HarnessModel(str(folder))


@pytest.mark.parametrize("rows", ["auto", 0, -1])
def test_batch_sizes_are_numbers(exported: str, rows: int | str):
    with pytest.raises(ValueError, match=f"batch_size of 1 or more; got {rows}"):
        HarnessModel(exported, batch_size=rows)


def test_a_continuation_beyond_the_context_is_refused(ours: HarnessModel):
    with pytest.raises(ValueError, match="continuation of 1 to 64 tokens; got 2 and"):
        scores(ours, [("the", STORY * 4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 10}, "top_k and top_p; got num_beams; remove them"),
        ({"max_gen_toks": 64}, "max_gen_toks below the max_length of 64; got 64"),
        ({"do_sample": True, "temperature": 0.0, "top_k": 5}, "expect a temperature above 0"),
    ],
    ids=str,
)
def test_generation_that_is_not_ours_is_refused(ours: HarnessModel, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generated(ours, [("the sea", {"max_gen_toks": 4, **options})])
