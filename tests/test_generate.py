"""Decoding: with a cache as without, as transformers does it, drawing as often as it should."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_longctx.checkpoint import export_pretrained
from lit_longctx.data.tokenizer import ByteTokenizer
from lit_longctx.generate import generate, generate_text, reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionScheme, RoPE, TransformerXL, XPos

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
NEW = 48


def model(position: PositionScheme | None = None, config: LlamaConfig = CONFIG) -> Llama:
    """Return a model whose weights are large enough that the likeliest token stands out."""
    llama = Llama(config, position or RoPE(theta=100.0))
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return llama.eval()


def prompts(rows: int = 3, seq: int = 5) -> Tensor:
    return torch.randint(3, CONFIG.vocab_size, (rows, seq))


@torch.no_grad()
def without_cache(llama: Llama, ids: Tensor, new: int) -> Tensor:
    """Read everything again for each token."""
    for _ in range(new):
        ids = torch.cat([ids, llama.logits(reading(ids))[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("position", [RoPE(100.0), XPos(), TransformerXL()], ids=repr)
def test_cached_greedy_is_the_argmax_of_reading_everything_again(position: PositionScheme):
    llama, prompt = model(position), prompts()
    found = generate(llama, prompt, NEW)
    assert found.shape == (3, 5 + NEW)
    assert torch.equal(found, without_cache(llama, prompt, NEW))
    assert all(len(row[5:].unique()) > 5 for row in found)  # no repetition that anything could do


def test_greedy_is_that_of_transformers_on_the_exported_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    llama, prompt = model(RoPE(theta=5e5)), prompts()
    export_pretrained(llama, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    # with these numbers as its ids, no row meets the end
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(generate(llama, prompt, NEW), expected)


def test_a_row_stops_at_eos_and_the_others_go_on():
    llama, prompt = model(), prompts(rows=4)
    free = generate(llama, prompt, NEW)
    eos = int(free[0, 5 + 3])  # what row 0 says fourth ends it, and whoever else says it
    found = generate(llama, prompt, NEW, eos=eos)
    ends = []
    for row, unbounded in zip(found, free, strict=True):
        met = (unbounded[5:] == eos).nonzero().flatten()
        end = 5 + int(met[0]) + 1 if len(met) else 5 + NEW
        ends.append(end)
        assert torch.equal(row[:end], unbounded[: min(end, found.shape[1])])
        assert (row[end:] == eos).all()
    assert ends[0] <= 5 + 4
    assert len(set(ends)) > 1
    assert found.shape[1] == max(ends)


def test_generation_stops_when_every_row_has_ended():
    llama, prompt = model(), prompts(rows=1)
    free = generate(llama, prompt, NEW)
    eos = int(free[0, 5 + 3])
    first = int((free[0, 5:] == eos).nonzero()[0])
    assert torch.equal(generate(llama, prompt, NEW, eos=eos), free[:, : 5 + first + 1])


def test_seeds_reproduce_and_differ():
    llama, prompt = model(), prompts()
    one, same, other = (generate(llama, prompt, NEW, 1.0, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sampling_is_independent_of_torchs_global_state():
    llama, prompt = model(), prompts()
    one = generate(llama, prompt, NEW, 1.0, seed=7)
    torch.manual_seed(123)
    assert torch.equal(one, generate(llama, prompt, NEW, 1.0, seed=7))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_their_logits(temperature: float):
    llama, prompt = model(), prompts(rows=1)
    draws = 20_000
    drawn = generate(llama, prompt.expand(draws, -1), 1, temperature)[:, -1]
    with torch.no_grad():
        logits = llama.logits(reading(prompt))[0, -1].double()
    chances = (logits / temperature).exp()
    chances = chances / chances.sum()
    found = drawn.bincount(minlength=CONFIG.vocab_size) / draws
    deviation = (chances * (1 - chances) / draws).sqrt()
    assert ((found - chances).abs() <= 5 * deviation + 1 / draws).all()


def test_text_goes_on_from_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=258, num_attention_heads=2, **shape)
    llama = model(config=config)
    folder = export_pretrained(llama, tmp_path / "hf", tokenizer=ByteTokenizer())
    text = generate_text(str(folder), "once", max_new_tokens=8)
    assert capsys.readouterr().out == text + "\n"
    ids = torch.tensor([[256, *b"once"]])
    expected = without_cache(llama, ids, 8)[0, 1:].tolist()
    if 257 in expected:
        expected = expected[: expected.index(257)]
    assert text == bytes(i for i in expected if i < 256).decode(errors="replace")


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path: Path):
    folder = export_pretrained(model(), tmp_path / "hf")
    with pytest.raises(ValueError, match="has no tokenizer; pass --tokenizer"):
        generate_text(str(folder), "x")
