"""Greedy and sampled decoding with a cache of keys and values."""

import torch
from jaxtyping import Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, one_document
from lit_longctx.checkpoint import load_pretrained, tokenizer_folder
from lit_longctx.data.tokenizer import open_tokenizer
from lit_longctx.model import Cache, Llama


def reading(ids: Int[Tensor, "batch seq"], past: int = 0) -> Batch:
    """Return a batch to read from: one document per row, no targets, `past` tokens read before."""
    batch, seq = ids.shape
    places = torch.arange(past, past + seq, device=ids.device).expand(batch, seq)
    rows = torch.zeros(batch, dtype=torch.long, device=ids.device)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, NO_TARGET),
        loss_weights=torch.zeros(ids.shape, device=ids.device),
        position_ids=places,
        sources=rows,
        samples=rows,
        documents=one_document(batch, seq, ids.device),
    )


@torch.inference_mode()
def generate(
    llama: Llama,
    prompt: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    temperature: float = 0.0,
    eos: int | None = None,
    seed: int = 0,
) -> Int[Tensor, "batch total"]:
    """Continue prompts of equal length; temperature 0 is greedy; stops once all rows met `eos`.

    Returns:
        Prompt and continuation; a row goes on with `eos` after it has met it.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    cache = Cache(llama.config.num_hidden_layers, planned=prompt.shape[1] + max_new_tokens)
    ids, new = prompt, prompt
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = llama.logits(reading(new, cache.length), cache)[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            chances = (logits / temperature).softmax(-1)
            new = torch.multinomial(chances, 1, generator=generator)
        if eos is not None:
            new = new.masked_fill(ended[:, None], eos)
            ended |= new[:, 0] == eos
        ids = torch.cat([ids, new], dim=1)
        if ended.all():
            break
    return ids


def generate_text(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: str | None = None,
) -> str:
    """Continue a prompt and print it.

    Args:
        checkpoint: Run folder or Hugging Face folder.
        prompt: Text to continue; it begins a document.
        max_new_tokens: Most tokens to add.
        temperature: 0 for the likeliest token each time; higher is more random.
        seed: Decides the random choices.
        tokenizer: `bytes` or a tokenizer.json; default: the checkpoint's own.
    """
    own = tokenizer or tokenizer_folder(checkpoint)
    if own is None:
        raise ValueError(f"{checkpoint} has no tokenizer; pass --tokenizer")
    coder = open_tokenizer(str(own))
    llama = load_pretrained(checkpoint).eval()
    ids = [coder.bos, *coder.encode([prompt])[0].tolist()]
    found = generate(llama, torch.tensor([ids]), max_new_tokens, temperature, coder.eos, seed)
    text = coder.decode(found[0].tolist())
    print(text)
    return text
