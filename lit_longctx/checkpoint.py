"""Model folders: Hugging Face's, our own runs', Meta's; opened once, loaded, exported.

Nothing here unpickles a file that did not come from one of our runs.
"""

import importlib
import json
import os
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lit_longctx import hub, hugging_face, manifest, meta, parameters, readers
from lit_longctx import position as schemes
from lit_longctx.attention import AttnImplementation
from lit_longctx.companions import (
    GENERATION,
    TOKENIZER,
    TOKENS,
    Companions,
    list_of,
)
from lit_longctx.layers import LayerKind, Layers
from lit_longctx.model import Llama, LlamaConfig, layers_of
from lit_longctx.position import PositionScheme
from lit_longctx.position.scheme import INHERITED, THETA

MODEL = "model.json"
"""File in a run's checkpoint that describes the model: config, position scheme, trained context."""


# ---- opening


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
        scaled_here = self.origin is not None and not _scaled_alike(self.origin, layers)
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

    def layers_with(self, position: PositionScheme | Layers | None) -> Layers:
        """Return the layers of a model that has this checkpoint's weights, and say what is taken.

        Args:
            position: Scheme or layers; what they leave open is the checkpoint's. Default: the
                checkpoint's own.
        """
        if position is None:
            return self.layers
        layers = layers_of(position, self.config, self)
        kinds = position.kinds if isinstance(position, Layers) else (LayerKind(position),)
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
        if self.hashed or not (self.path / manifest.NAME).is_file():
            return self
        if self.run is not None:
            path = newest_whole(self.run)
            opened = self if path == self.path else _opened(path)
            return replace(opened, run=self.run, hashed=True)
        if fault := fault_in(self.path):
            raise ValueError(f"{fault}; {_offer(self.path)}")
        return replace(self, hashed=True)

    def load(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: AttnImplementation = "sdpa",
        position: PositionScheme | Layers | None = None,
    ) -> Llama:
        """Return the model with its weights.

        Args:
            device: Where the weights go.
            dtype: Of the weights.
            attn_implementation: Attention back end.
            position: Scheme to use; what it leaves open is the checkpoint's, and said. Default: the
                checkpoint's.

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


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a run folder, one of its checkpoints, Meta's, or a Hub name.

    Of our own checkpoints, the description is checked and the sizes of the files, not yet their
    hashes: this happens on every process before they know each other. Of a run folder it is the
    newest checkpoint that is whole as far as that shows; what is torn is named and skipped.

    Raises:
        ValueError: There is no model in the folder, or it is torn.
    """
    path = Path(folder)
    if hub.is_name(str(folder)):
        path = hub.folder(str(folder), hub.MODEL_FILES)
        say(f"{folder}: {path}")
    if path.is_dir() and path.name.startswith("step-"):
        try:
            return _opened(path)
        except ValueError as error:
            raise ValueError(f"{error}; {_offer(path)}") from None
    if any((path / name).is_file() for name in ("config.json", MODEL, meta.PARAMS)):
        return _opened(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist; expected a Hugging Face or run folder")
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} holds neither config.json nor checkpoints; expected a Hugging Face or run "
            "folder"
        )
    run = path / "checkpoints"
    for step in steps_of(run):
        try:
            return replace(_opened(step), run=run)
        except ValueError as error:
            say(f"skipping {step.name}: {error}")
    raise ValueError(f"{run} holds no whole checkpoint; start the run anew")


def _opened(path: Path) -> Checkpoint:
    """Read what a folder that holds weights says of its model."""
    origin, context = None, None
    if (path / MODEL).is_file() or path.name.startswith("step-"):
        manifest.verify_sizes(path, hashed=(MODEL,))
        description = json.loads((path / MODEL).read_text())
        config = LlamaConfig(**description["config"])
        layers = _layers(description, config)
        origin, context = description.get("started_from"), description["context"]
    else:
        read = hugging_face.read_config if (path / "config.json").is_file() else meta.read_params
        config, position = read(path)
        layers = Layers.alike(position, config.num_hidden_layers)
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


# ---- whole or torn


def steps_of(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted((p for p in run.glob("step-*") if ".tmp-" not in p.name), reverse=True)


def newest_whole(run: Path, but: Path | None = None) -> Path:
    """Return the newest checkpoint whose hashes hold, naming on the way those that do not.

    Every file is hashed by one process. `but` is left out: it is known to be torn.
    """
    for step in steps_of(run):
        if step == but:
            continue
        fault = fault_in(step)
        if fault is None:
            return step
        say(f"skipping {step.name}: {fault}")
    raise ValueError(f"{run} holds no whole checkpoint; start the run anew")


def fault_in(folder: Path) -> str | None:
    """Hash a folder's files, each process its share; return the first fault, the same on all."""
    among = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if among else (0, 1)
    try:
        manifest.verify(folder, rank, ranks)
        faults = [None]
    except ValueError as error:
        faults = [str(error)]
    if ranks > 1:
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, faults[0])
        faults = gathered
    return next((fault for fault in faults if fault), None)


def _offer(torn: Path) -> str:
    """Name the newest whole checkpoint beside one that is torn."""
    try:
        return f"the newest whole one is {newest_whole(torn.parent, but=torn)}"
    except ValueError:
        return "there is no whole one beside it"


def say(line: str) -> None:
    """Print a line on one process of a run."""
    if dist.is_available() and dist.is_initialized():
        first = dist.get_rank() == 0
    else:
        ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
        first = next((rank for rank in ranks if rank is not None), "0") == "0"
    if first:
        print(line, flush=True)


# ---- what a run's checkpoint says of its model


def describe(llama: Llama, context: int | None) -> dict[str, Any]:
    """Return what MODEL holds: enough to rebuild the model without the run's YAML."""
    return {
        "config": asdict(llama.config),
        **describe_layers(llama.layers),
        "context": context,
        "torch": torch.__version__,
    }


def describe_layers(layers: Layers) -> dict[str, Any]:
    """Return `position` where one scheme describes all layers, else `layers`."""
    if layers.are_alike:
        return {"position": describe_position(layers.position)}
    kinds = [
        {"position": describe_position(kind.position), "window": kind.window}
        for kind in layers.kinds
    ]
    return {"layers": {"kinds": kinds, "kind_of": list(layers.kind_of)}}


def describe_position(position: PositionScheme) -> dict[str, Any]:
    """Return a scheme as class_path and init_args, the form configs use."""
    kind = type(position)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": vars(position)}


def _scaled_alike(origin: dict[str, Any], layers: Layers) -> bool:
    """Whether layers stretch positions as those that their run started from did."""
    if not layers.are_alike or "position" not in origin:
        return False
    told, now = origin["position"], describe_position(layers.position)
    factors = [scheme["init_args"].get("factor") for scheme in (told, now)]
    return told["class_path"] == now["class_path"] and factors[0] == factors[1]


def _layers(description: dict[str, Any], config: LlamaConfig) -> Layers:
    if "layers" not in description:
        return Layers.alike(_scheme(description["position"]), config.num_hidden_layers)
    kinds = description["layers"]["kinds"]
    return Layers(
        tuple(LayerKind(_scheme(kind["position"]), kind["window"]) for kind in kinds),
        tuple(description["layers"]["kind_of"]),
    )


def _scheme(description: dict[str, Any]) -> PositionScheme:
    module, name = description["class_path"].rsplit(".", 1)
    if module.startswith(schemes.__name__):  # the file of one of ours may have changed
        module = schemes.__name__
    return getattr(importlib.import_module(module), name)(**description["init_args"])


# ---- in and out


def load_pretrained(
    folder: str | Path,
    position: PositionScheme | None = None,
    attn_implementation: AttnImplementation = "sdpa",
) -> Llama:
    """Load a Hugging Face Llama folder or one of our runs, in float32.

    Args:
        folder: config.json with one or several safetensors files, a run folder, or one of its
            checkpoints.
        position: The scheme to use; theta and original_context that it leaves open are the
            folder's, and said. Default: the scheme that the folder describes.
        attn_implementation: Attention back end.

    Raises:
        ValueError: What is missing, torn, of another shape or beyond what this model can
            represent, by name.
    """
    opened = open_checkpoint(folder)
    return opened.load(attn_implementation=attn_implementation, position=position)


def export_pretrained(
    llama: Llama,
    folder: str | Path,
    tokenizer: Any = None,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Hugging Face folder that transformers 4 and 5 read as the same model.

    Tokenizer, chat template, special tokens and generation config are those of the checkpoint that
    the model was loaded from, and of its start before that.

    Args:
        llama: The model; sharded parameters are gathered one at a time.
        folder: Where to; must not exist. Appears whole or not at all.
        tokenizer: A folder to copy tokenizer files from, or an object with `.save(folder)`, in
            place of the checkpoint's.
        context: The new max_position_embeddings; default: the largest of the checkpoint's context,
            what was trained, and the scheme's reach (factor × original context).
        dtype: Of the stored weights.

    Raises:
        ValueError: for a position scheme that Hugging Face cannot represent.
    """
    start: Checkpoint | None = llama.start
    if start and not start.path.is_dir():
        say(f"{start.path}, from which the model was loaded, is gone: nothing is taken from there")
    beside = start.companions if start else Companions()
    if isinstance(tokenizer, str | Path):
        beside = replace(beside, given=Path(tokenizer))
    tokens = start.tokens if start else {}
    context = context or context_of(llama)[0]
    config = hugging_face.config_json(llama, context, dtype) | tokens
    with manifest.whole_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        parameters.save(llama, temporary, dtype)
        save = getattr(tokenizer, "save", None)
        if save:
            save(temporary)
        beside.write(temporary, tokenizer=not save)
        generation = beside.generation({key: config.get(key) for key in TOKENS})
        (temporary / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        hugging_face.compare_with_transformers(temporary, llama)
        for line in readers.check(config):
            say(f"{folder}: {line}")
    return Path(folder)


def context_of(llama: Llama) -> tuple[int, str]:
    """Return the context of a model, and what decides it."""
    if llama.start is not None:
        return llama.start.context_with(llama.layers)
    reach, configured = llama.layers.reach(0), llama.config.max_position_embeddings
    if any(isinstance(kind.position, schemes.YaRN) for kind in llama.layers.kinds):
        return reach  # no other fits it; the config's may be no more than the default
    return max((configured, "the config's"), reach, key=itemgetter(0))


def export(
    checkpoint: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    context: int | None = None,
) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        checkpoint: Run folder, or one of its checkpoints.
        output: Folder to make; must not exist.
        dtype: Of the stored weights.
        context: Tokens of context to write as max_position_embeddings; default: the largest of the
            start's, the longest that was trained, and the position scheme's reach.
    """
    opened = open_checkpoint(checkpoint).verified()
    llama = opened.load()
    told = (context, "as given") if context else context_of(llama)
    export_pretrained(llama, output, None, context, getattr(torch, dtype))
    written = json.loads((Path(output) / "config.json").read_text())["max_position_embeddings"]
    if written != told[0]:
        told = (written, "the original: transformers stretches positions from there")
    print(f"{llama.layers}")
    print(f"context {told[0]:,}: {told[1]}")
    beside = opened.companions
    print(f"tokenizer from {beside.tokenizer}, chat template from {beside.chat_template}")
    print(f"wrote {output}")
    return Path(output)
