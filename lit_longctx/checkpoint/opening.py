"""Open a model folder once: its config, layers, context, tokenizer and what lies beside them."""

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from lit_longctx import hub, manifest
from lit_longctx.checkpoint import hugging_face, meta, parameters
from lit_longctx.checkpoint.companions import TOKENIZER, Companions, list_of
from lit_longctx.checkpoint.description import MODEL, read_model, scaled_alike
from lit_longctx.checkpoint.trust import Untrusted, trusting
from lit_longctx.checkpoint.verification import fault_in, newest_whole, offer_whole, steps_of
from lit_longctx.model import Llama, LlamaConfig, layers_of
from lit_longctx.model.attention import AttnImplementation
from lit_longctx.model.layers import LayerPattern, Layers
from lit_longctx.position import PositionScheme
from lit_longctx.position.scheme import INHERITED, THETA
from lit_longctx.progress import say


@dataclass(frozen=True)
class Checkpoint:
    """A model folder and all that it says of its model, but the weights."""

    path: Path
    """Folder that holds the weights."""
    config: LlamaConfig
    layers: Layers
    trained_context: int
    """Tokens per sequence that the model was trained on."""
    tokenizer: Path | None
    """Folder that holds the tokenizer, if there is one."""
    origin: dict[str, Any] | None
    """What a run started from: its checkpoint, that one's position scheme and its context."""
    companions: Companions
    """Where its tokenizer, chat template and generation config are."""
    run: Path | None = None
    """The run's `checkpoints` if `path` is the newest of them, rather than one that was named."""
    hashed: bool = False
    """Whether the files' hashes were compared with the manifest."""

    @property
    def chat_template(self) -> Path | None:
        """Jinja file of the chat template, if it is a file of its own."""
        return self.companions.chat_template

    @property
    def tokens(self) -> dict[str, Any]:
        """Special tokens' ids under config.json's names; eos may be a list."""
        own = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id")}
        return own | self.companions.tokens()

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json holds."""
        return self.companions.generation(self.tokens)

    @property
    def ends(self) -> list[int]:
        """Every token at which generation stops."""
        return list_of(self.generation["eos_token_id"])

    @property
    def start_context(self) -> int | None:
        """Tokens of context of what a run started from, or of a model that is no run's."""
        if (self.path / MODEL).is_file() and self.origin is None:
            return None
        # runs of older versions did not store it
        return (self.origin or {}).get("context", self.config.max_position_embeddings)

    def context_with(self, layers: Layers) -> tuple[int, str]:
        """Return the context of a model with these weights and layers, and what decides it.

        Never below the start's, what was trained, or the scheme's reach: factor × original context,
        or × the start's context where the scheme has none.
        """
        if layers != self.layers:
            context, _ = self.context_with(self.layers)
            return max((context, "the checkpoint's"), layers.reach(context), key=itemgetter(0))
        start = self.start_context or 0
        scaled_here = self.origin is not None and not scaled_alike(self.origin, layers)
        return max(
            (start, "the start's"),
            (self.trained_context, "the longest that was trained"),
            layers.reach(start if scaled_here else 0),
            key=itemgetter(0),
        )

    def inherited(self) -> dict[str, Any]:
        """Return what position schemes take over where they leave it open.

        Of layers that differ, theta or original_context is there only where it is one.
        """
        found: dict[str, Any] = {"theta": THETA, "original_context": self.trained_context}
        for name in INHERITED:
            values = {vars(kind.position).get(name) for kind in self.layers.kinds} - {None}
            if values:
                del found[name]
            if len(values) == 1:
                found[name] = values.pop()
        return found

    def layers_with(self, position: PositionScheme | LayerPattern | Layers | None) -> Layers:
        """Return the layers of a model that has this checkpoint's weights, and say what is taken.

        Args:
            position: One scheme for all layers, which keep their windows, or a pattern of kinds, or
                the layers; what they leave open is the checkpoint's. Default: the checkpoint's own.
        """
        if position is None:
            return self.layers
        if isinstance(position, PositionScheme):
            position = self.layers.with_position(position)
        layers = layers_of(position, self.config, self)
        kinds = position.kinds.values() if isinstance(position, LayerPattern) else position.kinds
        for name in INHERITED:
            if any(name in kind.position.unset() for kind in kinds):
                say(f"position: {name} {self.inherited()[name]:.12g} from {self.path}")
        return layers

    def verified(self) -> "Checkpoint":
        """Return the checkpoint with its files' hashes checked, once, each process its share.

        Of a run, the newest that is whole; others are named. All processes must call it.

        Raises:
            ValueError: A file is torn or altered; where the checkpoint was named, the newest whole
                one beside it is named too.
        """
        if self.hashed or not manifest.is_sealed(self.path):
            return self
        if self.run is not None:
            path = newest_whole(self.run)
            opened = self if path == self.path else _opened(path)
            return replace(opened, run=self.run, hashed=True)
        if fault := fault_in(self.path):
            ours = (self.path / MODEL).is_file() or self.path.name.startswith("step-")
            cure = offer_whole(self.path) if ours else manifest.kept_otherwise(self.path)
            raise ValueError(f"{fault}; {cure}")
        return replace(self, hashed=True)

    def load(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: AttnImplementation = "auto",
        position: PositionScheme | LayerPattern | Layers | None = None,
    ) -> Llama:
        """Return the model with its weights.

        Args:
            device: Where the weights go.
            dtype: Of the weights.
            attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else
                sdpa.
            position: Scheme, or pattern of kinds of layers, to use; what it leaves open is the
                checkpoint's, and said. Default: the checkpoint's.

        Raises:
            ValueError: What is missing, torn, of another shape or beyond what this model can
                represent, by name.
        """
        whole = self.verified()
        with torch.device("meta"):
            llama = Llama(whole.config, whole.layers_with(position), attn_implementation)
        llama.to(dtype).to_empty(device=device)
        parameters.fill(llama, whole.path)
        llama.start = whole
        return llama


def open_checkpoint(folder: str | Path, trust: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a run folder, one of its checkpoints, Meta's, or a Hub name.

    Of our own checkpoints, the description is checked and the sizes of the files, not yet their
    hashes: this happens on every process before they know each other. Of a run folder it is the
    newest checkpoint that is whole as far as that shows; what is torn is named and skipped.

    Args:
        folder: Where the model is.
        trust: Import the position scheme that a run folder names, if it is none of this package's.

    Raises:
        ValueError: There is no model in the folder, or it is torn.
    """
    with trusting(trust):
        return _found(folder)


def _found(folder: str | Path) -> Checkpoint:
    path = Path(folder)
    if hub.is_name(str(folder)):
        path = hub.folder(str(folder), hub.MODEL_FILES)
        say(f"{folder}: {path}")
    if path.is_dir() and path.name.startswith("step-"):
        Companions.check(path.parent.parent)
        try:
            return _opened(path)
        except ValueError as error:
            raise ValueError(f"{error}; {offer_whole(path)}") from None
    if any((path / name).is_file() for name in ("config.json", MODEL, meta.PARAMS)):
        return _opened(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist; expected a Hugging Face or run folder")
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} holds neither config.json nor checkpoints; expected a Hugging Face or run "
            "folder"
        )
    Companions.check(path)
    run = path / "checkpoints"
    for step in steps_of(run):
        try:
            return replace(_opened(step), run=run)
        except Untrusted:
            raise
        except ValueError as error:
            say(f"skipping {step.name}: {error}")
    raise ValueError(f"{run} holds no whole checkpoint; start the run anew")


def _opened(path: Path) -> Checkpoint:
    """Read what a folder that holds weights says of its model."""
    origin, context = None, None
    if (path / MODEL).is_file() or path.name.startswith("step-"):
        manifest.verify_sizes(path, hashed=(MODEL,))
        config, layers, origin, context = read_model(path / MODEL)
    else:
        if manifest.is_sealed(path):
            files = manifest.read(path)["files"]
            manifest.check_listed(path, [f for f in files if not f.endswith(".safetensors")])
        if (path / "config.json").is_file():
            config, layers = hugging_face.read_config(path)
        else:
            config, position = meta.read_params(path)
            layers = Layers.uniform(position, config.num_hidden_layers)
    context = context or config.max_position_embeddings
    ours = (path / MODEL).is_file()
    beside = Companions.of_run(path.parent.parent) if ours else Companions(path)
    return Checkpoint(path, config, layers, context, _tokenizer_of(path, beside), origin, beside)


def _tokenizer_of(path: Path, beside: Companions) -> Path | None:
    """Folder of the tokenizer to use: the checkpoint's own, its run's, or its start's."""
    candidates = (path, path / TOKENIZER, path.parent.parent / TOKENIZER)
    files = ("tokenizer.json", "tokenizer.model")
    used = next((c for c in candidates if any((c / f).is_file() for f in files)), None)
    return used or beside.tokenizer


def load_pretrained(
    folder: str | Path,
    position: PositionScheme | LayerPattern | None = None,
    attn_implementation: AttnImplementation = "auto",
    trust: bool = False,
) -> Llama:
    """Load a Hugging Face Llama folder or one of our runs, in float32.

    Args:
        folder: config.json with one or several safetensors files, a run folder, or one of its
            checkpoints.
        position: The scheme, or pattern of kinds of layers, to use; theta and original_context
            that it leaves open are the folder's, and said. Default: what the folder describes.
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
        trust: Import the position scheme that a run folder names, if it is none of this package's.

    Raises:
        ValueError: What is missing, torn, of another shape or beyond what this model can
            represent, by name.
    """
    opened = open_checkpoint(folder, trust)
    return opened.load(attn_implementation=attn_implementation, position=position)
