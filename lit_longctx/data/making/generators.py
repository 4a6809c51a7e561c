"""Models that are asked for questions and answers: a server, or a checkpoint of ours."""

import json
import os
import threading
import time
from dataclasses import asdict
from typing import Any, Literal, final

import torch

from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.data.making.report import Unanswered
from lit_longctx.data.making.self_instruct import (
    Generator,
    Reply,
)
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Conversation, Malformed, Message
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.decoding import Sampling, decode
from lit_longctx.manifest import identity, short_hash
from lit_longctx.model import chosen_device
from lit_longctx.model.attention import AttnImplementation


@final
class Endpoint(Generator):
    """A model behind an OpenAI-compatible server, such as vLLM's or llama.cpp's.

    Requests that fail for the moment (timeouts, HTTP 408, 409, 429 and 5xx) are made again, after
    the time that the server asks for or one that doubles each time, with jitter.

    Args:
        base_url: Address, such as http://localhost:8000/v1.
        model: Name of the model there.
        key_variable: Environment variable that holds the API key; there is no other way to give it.
        max_tokens: Most tokens of a reply.
        temperature: 0 for the likeliest reply; higher is more random.
        concurrency: Most requests at a time.
        requests_per_minute: Most requests per minute, evenly spread; default: no limit.
        timeout: Seconds to wait for a reply.
        max_retries: How often a request is made again.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        max_tokens: int = 1024,
        temperature: float = 0.7,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        max_retries: int = 5,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"expected a base_url of http:// or https://; got {base_url}; mend it")
        if concurrency < 1:
            raise ValueError(f"expected a concurrency of 1 or more; got {concurrency}; raise it")
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(
                f"expected requests_per_minute above 0; got {requests_per_minute}; raise it or "
                "leave it out"
            )
        self.base_url = base_url
        self.model = model
        self.key_variable = key_variable
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.concurrency = concurrency
        self.gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next = 0.0
        """Time before which no request may be made."""
        self.lock = threading.Lock()
        self._key = os.environ.get(key_variable, "").strip()
        if not self._key:
            raise ValueError(
                f"expected an API key in the environment variable {key_variable}; got none; set it "
                "(to anything, where the server wants none)"
            )
        self._client = self._opened(timeout, max_retries)

    def _opened(self, timeout: float, max_retries: int) -> Any:
        try:
            import openai
        except ImportError:
            raise ValueError(
                "Endpoint needs the package openai; pip install 'lit_longctx[synthesize]'"
            ) from None
        # a hook, since the client makes requests again without us
        client = openai.DefaultHttpxClient(event_hooks={"request": [self._wait_for_turn]})
        return openai.OpenAI(
            api_key=self._key,
            base_url=self.base_url,
            timeout=timeout,
            max_retries=max_retries,
            http_client=client,
        )

    def _wait_for_turn(self, _: object) -> None:
        with self.lock:
            self.requests += 1
            turn = max(self.next, time.monotonic())
            self.next = turn + self.gap
        time.sleep(max(0.0, turn - time.monotonic()))

    def identity(self) -> dict[str, Any]:
        """Return model and settings; a server may move without its replies being asked anew."""
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }

    def complete(self, prompt: str, seed: int) -> Reply:
        """Ask the server; what it says in another form than it should is no reply."""
        body = self._body(prompt, seed)
        try:
            said = json.loads(body)
            content = said["choices"][0]["message"]["content"]
        except ValueError:
            raise Unanswered("broken JSON", self._without_key(body)) from None
        except (KeyError, IndexError, TypeError):
            raise Unanswered("no choices", self._without_key(body)) from None
        cut = said["choices"][0].get("finish_reason") == "length"
        text = content if isinstance(content, str) else ""
        return Reply(text, *used_tokens(said.get("usage")), cut)

    def _body(self, prompt: str, seed: int) -> str:
        import openai

        try:
            return self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=seed,
            ).text
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise ValueError(
                    f"{self.base_url} refuses with HTTP {error.status_code}; check address, model "
                    f"{self.model} and the key in {self.key_variable}"
                ) from None
            detail = self._without_key(error.message)
            raise Unanswered(f"HTTP {error.status_code}", detail) from None
        except openai.APITimeoutError:
            raise Unanswered("timeout") from None
        except openai.APIConnectionError:
            raise Unanswered("no connection") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "…")


def used_tokens(usage: Any) -> tuple[int, int]:
    """Return the tokens read and written, as far as a server tells."""
    found = usage if isinstance(usage, dict) else {}
    read, written = (found.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return read if isinstance(read, int) else 0, written if isinstance(written, int) else 0


@final
class Checkpoint(Generator):
    """A model of ours, in this process; one prompt at a time.

    Args:
        checkpoint: Run folder or Hugging Face folder.
        tokenizer: `bytes` or a tokenizer.json; default: the checkpoint's own.
        chat_template: Jinja file, or `plain` for one of ours; default: the tokenizer's own.
        max_tokens: Most tokens of a reply.
        temperature: 0 for the likeliest token each time; higher is more random.
        top_p: Draw from the fewest likeliest tokens that have this probability.
        prefill_tokens: Prompt tokens to read at a time; fewer need less memory.
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
        dtype: Of weights, keys and values.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        max_tokens: int = 1024,
        temperature: float = 0.7,
        top_p: float = 1.0,
        prefill_tokens: int = 1024,
        attn_implementation: AttnImplementation = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
    ) -> None:
        start = open_checkpoint(checkpoint).verified()
        own = tokenizer or start.tokenizer
        if own is None:
            raise ValueError(f"{checkpoint} has no tokenizer; pass --task.generator.tokenizer")
        self.tokenizer = open_tokenizer(str(own))
        self.template = ChatTemplate(self.tokenizer, chat_template)
        self.max_tokens = max_tokens
        self.sampling = Sampling(temperature, top_p=top_p)
        self.prefill_tokens = prefill_tokens
        self.checkpoint, self.holds, self.dtype = checkpoint, identity(start.path), dtype
        llama = start.load(chosen_device(device), getattr(torch, dtype), attn_implementation)
        self.llama = llama.eval()

    def identity(self) -> dict[str, Any]:
        """Return what the folder holds, how it is spoken to and how its tokens are drawn."""
        return {
            "model": self.checkpoint,
            "holds": self.holds,
            "tokenizer": self.tokenizer.fingerprint,
            "chat_template": short_hash(self.template.source),
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            **asdict(self.sampling),
        }

    def complete(self, prompt: str, seed: int) -> Reply:
        """Decode until the turn ends."""
        self.requests += 1
        ids, ends = self.prompt_ids(prompt)
        given = torch.tensor(ids, device=self.llama.head_weight.device)
        new: list[int] = []
        for token in decode(
            self.llama,
            [given],
            self.max_tokens,
            self.sampling,
            seed=seed,
            prefill_tokens=self.prefill_tokens,
        ):
            new.append(int(token))
            if new[-1] in ends:
                break
        text = self.tokenizer.decode([token for token in new if token not in ends])
        return Reply(text, len(ids), len(new), not new or new[-1] not in ends)

    def prompt_ids(self, prompt: str) -> tuple[list[int], set[int]]:
        """Return a prompt's ids as the template wants them, and the tokens that end a reply."""
        messages = Message("user", prompt), Message("assistant", "x")
        try:
            ids, answers, _ = self.template.render(Conversation(messages, "", ""))
        except Malformed as reason:
            raise Unanswered(str(reason)) from None
        (said,) = answers.nonzero()
        return ids[: said[0]].tolist(), {int(ids[said[-1]]), self.tokenizer.eos}
