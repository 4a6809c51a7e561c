"""Our models in EleutherAI's lm-evaluation-harness, under the name `lit_longctx`.

    python -m lit_longctx.evaluation.harness run --model lit_longctx \
        --model_args pretrained=runs/x,dtype=bfloat16 --tasks longbench

is the `lm_eval` command with one model more; once this module is imported,
`lm_eval.simple_evaluate(model="lit_longctx", ...)` knows it too. So lm-eval's tasks run on every
position scheme, also on those that Hugging Face cannot represent.
"""

import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lit_longctx.batch import pack
from lit_longctx.checkpoint import describe_layers, open_checkpoint
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Malformed, Message
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.decoding import GREEDY, Sampling, decode
from lit_longctx.evaluation.harness_input import check_no_code, unfetched
from lit_longctx.generate import TextStream, ends_of
from lit_longctx.json_file import error_text
from lit_longctx.model import chosen_device
from lit_longctx.model.attention import AttnImplementation
from lit_longctx.model.head import token_top1_correct

try:
    import requests
    from datasets.exceptions import DatasetNotFoundError
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    message = f"the harness needs lm_eval ({error}); pip install 'lit_longctx[eval]'"
    raise (SystemExit if __name__ == "__main__" else ModuleNotFoundError)(message) from None

logger = logging.getLogger(__name__)

Tokens = list[int]
Scored = tuple[tuple[str, str] | None, Tokens, Tokens]
"""What lm-eval asks: the texts, if it is to remember the answer; ids of context, continuation."""


@final
@register_model("lit_longctx")
class HarnessModel(TemplateLM):
    """A checkpoint that answers lm-eval's three kinds of request.

    Answers are those of lm-eval's `hf` model on the exported folder, where there can be one. That
    includes its rolling log-likelihoods, which with BOS also score the BOS of the text, after
    another. It differs in three things. Special tokens in a task's text are plain text here, but
    ids for `hf`; those that a chat template writes are ids in both. Sampling draws from all tokens
    unless the task sets top_k, where transformers takes the 50 likeliest. Where stop strings
    overlap, text ends before the one that is first complete, in any batch.

    A forward pass costs the memory of batch_size × max_length tokens, but logits exist only where
    a continuation is scored.

    Args:
        pretrained: Run folder or Hugging Face folder.
        tokenizer: `bytes`, a tokenizer file or its folder; default: the checkpoint's own. RULER
            reads this argument too, to measure its prompts, and takes only a folder.
        max_length: Most tokens that are read at a time; default: the context that the checkpoint
            was trained on. Longer contexts lose their beginning.
        max_gen_toks: Most tokens to generate where a task does not say.
        batch_size: Requests that are read at a time.
        add_bos_token: Whether texts begin with BOS; default: as the tokenizer's files have it.
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
        dtype: Of weights, keys and values.
        device: `auto`, `cpu` or `cuda`, which without CUDA is the CPU.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        add_bos_token: bool | None = None,
        attn_implementation: AttnImplementation = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"expected a batch_size of 1 or more; got {batch_size}; give a number")
        start = open_checkpoint(pretrained)
        own = tokenizer or start.tokenizer
        check_no_code(start.path)
        if own is None:
            raise ValueError(f"{pretrained} has no tokenizer; pass tokenizer=FOLDER in model_args")
        check_no_code(Path(own))
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval's command says cuda:0 where its user says nothing
        self._device = torch.device(chosen_device(device))
        self.tokenizer = open_tokenizer(str(own))
        llama = start.load(self._device, getattr(torch, dtype), attn_implementation)
        self.llama = llama.eval()
        self.max_length = max_length or start.trained_context
        self.max_gen_toks = max_gen_toks
        self.batch_size = int(batch_size)
        self.add_bos_token = bool(self.tokenizer.prefix) if add_bos_token is None else add_bos_token

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """BOS: what the first token of a text without context follows."""
        return self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval would keep prompts of a chat template."""
        return self.tokenizer.fingerprint

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template; ValueError if it has none."""
        return ChatTemplate(self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the Jinja text that lm-eval's results quote; None without --apply_chat_template.

        Raises:
            ValueError: A template is asked for by name, or the tokenizer has none.
        """
        if isinstance(chat_template, str):
            raise ValueError(
                f"expected --apply_chat_template alone; got the name {chat_template}; save that "
                "template as chat_template.jinja beside the tokenizer"
            )
        return self.template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        r"""Write messages as the model's chat template has them; special tokens between two NULs.

        Where lm-eval asks for no generation prompt, the last message is one that the model goes on
        with, as RULER's beginnings of answers are. A template that refuses a system message gets
        the others, as in the `hf` model.

        Raises:
            ValueError: The template refuses the messages, or hides or rewrites one.
        """
        messages = [Message(each["role"], each["content"]) for each in chat_history]
        try:
            return self.template.marked_prompt(messages, continued=not add_generation_prompt)
        except Malformed as error:
            others = [message for message in messages if message.role != "system"]
            if len(others) == len(messages):
                raise ValueError(f"a prompt cannot be written as a chat: {error}") from None
            logger.warning("the chat template refuses a system message (%s): it is left out", error)
            return self.template.marked_prompt(others, continued=not add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's results say of the model."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.llama.parameters()),
            "model_dtype": str(self.llama.head_weight.dtype),
            **describe_layers(self.llama.layers),
            "max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Ids of a text, with BOS in front unless told otherwise, or a chat template wrote it."""
        if "template" in vars(self):  # a chat template is in use, and has marked special tokens
            ids = self.template.encode_marked(string)
        else:
            ids = self.tokenizer.encode([string])[0].tolist()
        begin = self.add_bos_token and ids[:1] != [self.tokenizer.bos]
        begin = begin if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos] * begin + ids

    # ---- scores of given text

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(ln p, whether greedy decoding would say it) of continuations, longest rows first.

        Requests that differ in their last token only are read once, as the answers A, B, C and D.
        """
        order: Any = Collator(  # its own types are those of logits and of pairs
            requests,
            sort_fn=lambda asked: (-len(asked[1] + asked[2]), asked[1] + asked[2]),
            group_by="contexts",
            group_fn=lambda asked: asked[1] + asked[2][:-1],
        )
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood requests")
        found = []
        for chunk in order.get_batched(n=self.batch_size):
            rows = [self._inputs(context, continuation) for _, context, continuation in chunk]
            for asked, states in zip(chunk, self._states(rows), strict=True):
                # lm-eval hands out logits of [1, seq, vocab] here; hidden states do as well
                for text, target, shared in order.get_cache(*asked, states[None]):
                    found.append(self._score(shared[0, -len(target) :], target))
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[-1])
                    progress.update()
        progress.close()
        return order.get_original(found)

    def _inputs(self, context: Tokens, continuation: Tokens) -> Tokens:
        """Tokens to read: all but the last, which is a target only; at most max_length."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"expected a context and a continuation of 1 to {self.max_length} tokens; got "
                f"{len(context)} and {len(continuation)}; raise max_length or drop the request"
            )
        return self._last(context + continuation, self.max_length + 1)[:-1]

    def _last(self, ids: Tokens, room: int) -> Tokens:
        """Return the last ids that there is room for."""
        if len(ids) > room:
            logger.warning("%d tokens, room for %d: the first are left out", len(ids), room)
        return ids[-room:]

    @torch.inference_mode()
    def _states(self, rows: Sequence[Tokens]) -> list[Float[Tensor, "seq width"]]:
        """Final hidden states of rows of any lengths; nothing sees the padding behind them."""
        # one place more than the longest row, for the target that `pack` takes from the end
        padded = [torch.tensor([*row, -1], device=self.device) for row in rows]
        windows = pad_sequence(padded, batch_first=True, padding_value=-1)
        starts = torch.zeros_like(windows, dtype=torch.bool)  # a second BOS begins no document
        hidden = self.llama.hidden(pack(windows, self.tokenizer.bos, starts))
        return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]

    def _score(self, states: Float[Tensor, "seq width"], target: Tokens) -> tuple[float, bool]:
        """Ln p of tokens, each from the state before it, and whether each is the likeliest."""
        labels = torch.tensor(target, device=self.device)
        nats, top1_correct = token_top1_correct(states, self.llama.head_weight, labels)
        return -float(nats.sum()), bool(top1_correct.all())

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Ln p of whole texts, in windows of max_length that follow one another.

        Only the last window goes back, so that it is as long as the others.
        """
        windows = [self._windows(request.args[0]) for request in requests]
        asked = [(None, *window) for each in windows for window in each]
        scores = iter(self._loglikelihood_tokens(asked, disable_tqdm))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> list[tuple[Tokens, Tokens]]:
        """(what comes before, what is scored) of a text, each token scored once."""
        pairs = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return [make_disjoint_window(pair) for pair in pairs]

    # ---- generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string, EOS or max_gen_toks; longest prompts first."""
        pairs: list[Any] = [request.args for request in requests]
        order: Any = Collator(
            pairs,
            sort_fn=lambda asked: (-len(self.tok_encode(asked[0])), asked[0]),
            group_by="gen_kwargs",
            group_fn=lambda asked: asked[1],
        )
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until requests")
        found = []
        for chunk in order.get_batched(n=self.batch_size):
            texts = self._continuations([context for context, _ in chunk], chunk[0][1])
            for asked, text in zip(chunk, texts, strict=True):
                self.cache_hook.add_partial("generate_until", asked, text)
            found += texts
            progress.update(len(texts))
        progress.close()
        return order.get_original(found)

    def _continuations(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Continuations of prompts that share their options; stop strings are left out."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = [stop for stop in handle_stop_sequences(given.pop("until"), eos=None) if stop]
        most, sampling = given.pop("max_gen_toks"), sampled(given)
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"expected max_gen_toks below the max_length of {self.max_length}; got {most}; "
                "lower it with --gen_kwargs"
            )
        ids = [self._last(self.tok_encode(context), room) for context in contexts]
        prompts = [torch.tensor(row, device=self.device) for row in ids]
        ends = ends_of(self.llama, self.tokenizer)
        rows = [TextStream(self.tokenizer, stop=until, ends=ends) for _ in contexts]
        texts = ["" for _ in contexts]
        # lm-eval seeds torch; repeated requests need draws of their own
        seed = int(torch.randint(2**62, ()))
        for tokens in decode(self.llama, prompts, most, sampling, seed=seed):
            pieces = [row.add(token) for row, token in zip(rows, tokens.tolist(), strict=True)]
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if all(row.ended for row in rows):
                break
        return [text + row.close() for text, row in zip(texts, rows, strict=True)]


def sampled(options: dict[str, Any]) -> Sampling:
    """Sampling that a task asks for; greedy where it does not, whatever else it says."""
    options = {name: value for name, value in options.items() if (name, value) != ("num_beams", 1)}
    unknown = options.keys() - {"do_sample", "temperature", "top_k", "top_p"}
    if unknown:
        raise ValueError(
            "expected generation options do_sample, temperature, top_k and top_p; got "
            f"{', '.join(sorted(unknown))}; remove them from the task"
        )
    if not options.pop("do_sample"):
        return GREEDY
    return Sampling(**{"temperature": 1.0, **options})


def main() -> None:
    """Run lm-eval's command; bad input, and data that cannot be fetched, are one line."""
    try:
        cli_evaluate()
    except (ConnectionError, requests.RequestException, DatasetNotFoundError) as error:
        sys.exit(unfetched(error_text(error)))
    except (ValueError, OSError) as error:
        sys.exit(f"harness: error: {error_text(error)}")
    except LookupError as error:
        if "nltk" not in str(error):
            raise
        sys.exit(unfetched("NLTK's punkt_tab, which cuts essays into sentences, is not installed"))


if __name__ == "__main__":
    main()
