"""What belongs to a start goes with it into every export: template, ends, generation config."""

import json
from pathlib import Path

import pytest
import torch
from test_checkpoint import unsealed
from test_cli import start_from
from training import runs, test_sft

from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.checkpoint.companions import TOKENIZER_FILES
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import decode
from lit_longctx.generate import stream
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE, YaRN

transformers = pytest.importorskip("transformers")

SHAPE = LlamaConfig(258, 16, 16, 1, 2, max_position_embeddings=1024)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\x05{% endfor %}"
)
ENDS = [257, 5, 4]
GENERATION = {
    "bos_token_id": 256,
    "eos_token_id": ENDS,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}
EXTRAS = {
    "chat_template.jinja": TEMPLATE,
    "special_tokens_map.json": '{"pad_token": "<eos>"}',
    "added_tokens.json": "{}",
    "generation_config.json": json.dumps(GENERATION),
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of an instruct model with three ends, a template and a pad."""
    llama = Llama(SHAPE, RoPE(5e5))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(0.0, 0.3)
    folder = export_pretrained(llama, tmp_path_factory.mktemp("start") / "hf", ByteTokenizer())
    unsealed(folder)
    for name, content in EXTRAS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 256, "eos_token_id": ENDS, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_keeps(folder: Path, start: Path, template: str = TEMPLATE) -> None:
    for name in (*TOKENIZER_FILES, "additional_chat_templates/tools.jinja"):
        if (start / name).is_file() and name != "chat_template.jinja":
            assert (folder / name).read_bytes() == (start / name).read_bytes(), name
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ENDS
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, ENDS, 0)
    templates = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert templates == {"default": template, "tools": "{{ tools }}"}


def exported(run: Path, folder: Path, *options: object) -> tuple[Path, str]:
    given = ["--checkpoint", run, "--output", folder, *options]
    return folder, runs.run("export", *given).succeeded().out


def test_in_python(instruct: Path, tmp_path: Path):
    llama = load_pretrained(instruct, YaRN(factor=2))
    assert_keeps(export_pretrained(llama, tmp_path / "a"), instruct)
    assert_keeps(export_pretrained(llama, tmp_path / "b", tokenizer=instruct), instruct)
    own = export_pretrained(llama, tmp_path / "c", tokenizer=ByteTokenizer())
    assert (own / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((own / "generation_config.json").read_text()) == GENERATION


@pytest.fixture(scope="module")
def pretrained(instruct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of continued pretraining from the instruct model."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    scheme = '{"class_path": "YaRN", "init_args": {"factor": 2}}'
    start_from(instruct, folder, "--model.init_args.position", scheme).succeeded()
    return folder


@pytest.mark.slow
def test_after_continued_pretraining(instruct: Path, pretrained: Path, tmp_path: Path):
    folder, out = exported(pretrained, tmp_path / "a")
    assert_keeps(folder, instruct)
    assert "context 2,048: the reach of YaRN, factor 2 × 1,024" in out
    assert open_checkpoint(pretrained).ends == ENDS


@pytest.mark.slow
def test_after_fine_tuning_from_that_run(instruct: Path, pretrained: Path, tmp_path: Path):
    """The start's companions come through both runs; the template is the one trained on."""
    arguments = ["fit", "--config", test_sft.chat_config(), "--model.init_args.config", "null"]
    arguments += ["--model.init_args.checkpoint", pretrained, "--trainer.max_steps", 4]
    arguments += ["--trainer.default_root_dir", tmp_path / "second"]
    runs.run(*arguments, folder=tmp_path / "second").succeeded()
    folder, out = exported(tmp_path / "second", tmp_path / "b")
    data = tmp_path / "second" / "tokenizer" / "chat_template.jinja"
    assert data.read_text() != TEMPLATE
    assert_keeps(folder, instruct, template=data.read_text())
    assert "context 2,048: the start's" in out
    assert f"chat template from {data}" in out
    folder, out = exported(tmp_path / "second", tmp_path / "c", "--context", 2048)
    assert "context 2,048: as given" in out


def test_a_chats_own_end_is_added(instruct: Path, tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    ByteTokenizer().save(tokenizer)
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": [7]}')
    folder = export_pretrained(load_pretrained(instruct), tmp_path / "out", tokenizer)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {**GENERATION, "eos_token_id": [*ENDS, 7]}


def test_generation_stops_at_every_end(instruct: Path):
    """As transformers' greedy generation does, for each of the ends in turn."""
    llama, prompt = load_pretrained(instruct).eval(), "ab"
    ids = torch.tensor([256, *prompt.encode()])
    free = [int(tokens) for tokens in decode(llama, [ids], 12)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    for end in dict.fromkeys(free):
        ends = [257, end, 4]
        own = json.dumps({**GENERATION, "eos_token_id": ends, "do_sample": False})
        llama.start.companions.start.joinpath("generation_config.json").write_text(own)
        pieces = "".join(piece for (piece,) in stream(llama, ByteTokenizer(), [prompt], 12))
        out = theirs.generate(
            ids[None], max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        expected = [int(i) for i in out[0, len(ids) :] if int(i) not in ends]
        assert pieces == ByteTokenizer().decode(expected)
        assert len(list(decode(llama, [ids], 12, eos=ends))) == len(expected) + 1
    (instruct / "generation_config.json").write_text(json.dumps(GENERATION))


def test_a_start_that_is_gone_is_named(
    instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    llama = load_pretrained(instruct)
    moved = instruct.rename(instruct.with_name("moved"))
    folder = export_pretrained(llama, tmp_path / "out")
    moved.rename(instruct)
    assert f"{instruct}, from which the model was loaded, is gone" in capsys.readouterr().out
    assert not (folder / "tokenizer.json").exists()
