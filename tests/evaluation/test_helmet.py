"""HELMET's recall: RULER's wording as lm-eval ships it, and JSON objects read back by json."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest

from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.evaluation.retrieval.helmet import JsonKv, NiahMk2, NiahMk3, NiahMv
from lit_longctx.evaluation.retrieval.prompts import Haystack

HAY = Haystack(ByteTokenizer())


def text_of(sample) -> str:
    return bytes(sample.prompt_ids[1:].tolist()).decode()


def without_names(text: str) -> list[str]:
    """Lines in which every key and value is the same."""
    text = re.sub(r" for \S+ is: [\w-]+\.", " for KEY is: VALUE.", text)
    return re.sub(r" for \S+ mentioned", " for KEY mentioned", text).split("\n")


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch):
    """Return lm-eval's copy of RULER; what it fetches when imported, its prompts here need not."""
    pytest.importorskip("wonderwords")
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(nltk.data, "find", lambda *_: None)
    return [
        importlib.import_module(f"lm_eval.tasks.ruler.{name}")
        for name in ("prepare_niah", "niah_utils")
    ]


@pytest.mark.slow  # wonderwords' pairs of words are nine million
@pytest.mark.parametrize(
    ("task", "haystack", "settings"),
    [
        (NiahMk2(), "needle", {"type_needle_k": "words", "type_needle_v": "numbers"}),
        (NiahMk3(), "needle", {"type_needle_k": "uuids", "type_needle_v": "uuids"}),
        (NiahMv(), "repeat", {"type_needle_k": "words", "type_needle_v": "numbers"}),
    ],
    ids=str,
)
def test_prompts_have_the_wording_of_ruler(ruler, task, haystack, settings):
    """HELMET puts RULER's beginning of an answer on a line of its own."""
    prepare, utils = ruler
    (theirs,) = prepare.generate_samples(
        prepare.get_haystack(haystack),
        max_seq_length=400,
        template=utils.TEMPLATE,
        type_haystack=haystack,
        num_samples=1,
        num_needle_v=4 if isinstance(task, NiahMv) else 1,
        TOKENIZER=lambda text: SimpleNamespace(input_ids=text.split()),
        **settings,
    )
    expected = without_names(f"{theirs['input']}\n{theirs['gen_prefix']}")
    found = without_names(text_of(task.sample(HAY, 3000, 50)))
    assert (found[0], found[-2:]) == (expected[0], expected[-2:])
    if haystack == "needle":
        assert set(found[1:-3]) == set(expected[1:-2])
        assert len(set(found[1:-3])) == 1
        return
    (needle,) = {line for line in expected[1:-2] if "magic" in line}
    assert " ".join(" ".join(found).split()).count(f". {needle} ") == 4


def test_the_asked_needle_stands_where_depth_says():
    for task in (NiahMk2(), NiahMk3()):
        for depth in (0, 50, 100):
            sample = task.sample(HAY, 8000, depth, seed=1)
            lines = text_of(sample).split("\n")[1:-2]
            (place,) = [i for i, line in enumerate(lines) if sample.references[0] in line]
            assert place == round((len(lines) - 2) * depth / 100)  # the last is cut short
            assert len(lines) > 60


@pytest.mark.parametrize("shots", [0, 2])
def test_a_json_object_holds_what_is_asked_and_shown(shots):
    sample = JsonKv(shots=shots).sample(HAY, 8000, 50, seed=2)
    held, asked = text_of(sample).split("\n\n", 1)
    *lines, _, end = held.split("\n")
    pairs = json.loads("\n".join(lines).rstrip(",") + end)
    shown = dict(re.findall(r"Key: (.+)\nCorresponding value: (.+)\n\n", asked))
    (key,) = re.findall(r"Key: (.+)\nCorresponding value:$", asked)
    assert (pairs[key],) == sample.references
    assert len(shown) == shots
    assert key not in shown
    assert shown.items() <= pairs.items()
    examples = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in shown.items())
    assert asked == (  # HELMET's data.py, load_json_kv
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f"{examples}Key: {key}\nCorresponding value:"
    )
    assert abs(list(pairs).index(key) / len(pairs) - 0.5) < 0.05
    assert len(pairs) > 80
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert all(re.fullmatch(uuid, each) for pair in pairs.items() for each in pair)


def test_scores_are_those_of_helmet():
    """Substring exact match after SQuAD's normalization; recall of substrings in any case."""
    sample = JsonKv().sample(HAY, 2000)._replace(references=("0a1-The-b2",))
    for response, score in (
        (" 0a1-The-b2", 1),
        ('"0A1-THE-B2", and so on', 1),
        ("0a1Theb2", 1),
        ("0a1-The-b", 0),
        ("", 0),
    ):
        assert JsonKv().score(sample, response) == score
    sample = NiahMv().sample(HAY, 3000)
    first, second, *_ = sample.references
    assert NiahMv().score(sample, f"{second} and {first}") == 0.5


def test_answers_are_as_long_as_in_helmets_config():
    tasks = (NiahMk2(), NiahMk3(), NiahMv(), JsonKv())
    assert [task.max_new_tokens for task in tasks] == [50, 100, 50, 100]
    with pytest.raises(ValueError, match=r"expected shots of 0 and max_new_tokens of 1 or more"):
        JsonKv(shots=-1)
