"""Model folders: Hugging Face's, our own runs', Meta's; opened once, loaded, exported.

Nothing here unpickles a file that did not come from one of our runs.
"""

import importlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lit_longctx import hub, hugging_face, manifest, meta, parameters
from lit_longctx import position as schemes
from lit_longctx.attention import AttnImplementation
from lit_longctx.layers import LayerKind, Layers
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionScheme

MODEL = "model.json"
"""File in a run's checkpoint that describes the model: config, position scheme, trained context."""
CHAT_TEMPLATE = "chat_template.jinja"
"""File beside a tokenizer that says how its model wants to be talked to."""
GENERATION = "generation_config.json"
"""File beside a model, or its tokenizer, that says which tokens end a text."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    CHAT_TEMPLATE,
)


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
    """What a run started from: its checkpoint and position scheme."""
    run: Path | None = None
    """The run's `checkpoints` if `path` is the newest of them, rather than one that was named."""
    hashed: bool = False
    """Whether the files' hashes were compared with the manifest."""

    @property
    def chat_template(self) -> Path | None:
        """Jinja file of the tokenizer's chat template, if it has one of its own."""
        file = self.tokenizer and self.tokenizer / CHAT_TEMPLATE
        return file if file and file.is_file() else None

    @property
    def generation(self) -> dict[str, Any]:
        """generation_config.json of the model, or of its tokenizer."""
        folders = (self.path, self.tokenizer) if self.tokenizer else (self.path,)
        files = [folder / GENERATION for folder in folders]
        return next((json.loads(file.read_text()) for file in files if file.is_file()), {})

    def inherited(self) -> dict[str, float]:
        """Return what position schemes take over unless told otherwise: theta, original_context.

        Of layers that differ, theta is there only where it is one.
        """
        found: dict[str, Any] = {"original_context": self.trained_context}
        for name in ("theta", "original_context"):
            values = {vars(kind.position).get(name) for kind in self.layers.kinds} - {None}
            if len(values) == 1:
                found[name] = values.pop()
        return found

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
            position: Scheme to use; default: the checkpoint's.

        Raises:
            ValueError: What is missing, torn, of another shape or beyond what this model can
                represent, by name.
        """
        whole = self.verified()
        with torch.device("meta"):
            llama = Llama(whole.config, position or whole.layers, attn_implementation)
        llama.to(dtype).to_empty(device=device)
        parameters.fill(llama, whole.path)
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
    return Checkpoint(path, config, layers, context, _tokenizer_of(path), origin)


def _tokenizer_of(path: Path) -> Path | None:
    """Folder of a checkpoint's tokenizer: its own, or its run's."""
    candidates = (path, path / "tokenizer", path.parent.parent / "tokenizer")
    files = ("tokenizer.json", "tokenizer.model")
    return next((c for c in candidates if any((c / f).is_file() for f in files)), None)


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
        first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
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
        position: The scheme to use; default: the one the folder describes.
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

    Args:
        llama: The model; sharded parameters are gathered one at a time.
        folder: Where to; must not exist. Appears whole or not at all.
        tokenizer: A folder to copy tokenizer files from, or an object with `.save(folder)`.
        context: The new max_position_embeddings; default: the config's.
        dtype: Of the stored weights.

    Raises:
        ValueError: for a position scheme that Hugging Face cannot represent.
    """
    config = hugging_face.config_json(llama, context, dtype)
    with manifest.whole_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        parameters.save(llama, temporary, dtype)
        _save_tokenizer(tokenizer, temporary)
        (temporary / GENERATION).write_text(json.dumps(_ends(config, tokenizer), indent=2) + "\n")
        hugging_face.compare_with_transformers(temporary, llama)
    return Path(folder)


def _ends(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return where texts begin and end: a chat's turns end as the tokenizer's folder says."""
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    folder = tokenizer if isinstance(tokenizer, str | Path) else None
    if folder is not None and (file := Path(folder) / GENERATION).is_file():
        told = json.loads(file.read_text()).get("eos_token_id")
        both = {*(told if isinstance(told, list) else [told]), config["eos_token_id"]} - {None}
        ends["eos_token_id"] = sorted(both) if len(both) > 1 else next(iter(both), None)
    return ends


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
        return
    found = [
        Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()
    ]
    if not found:
        raise ValueError(f"{tokenizer} holds none of {', '.join(TOKENIZER_FILES)}")
    for file in found:
        shutil.copy(file, folder)


def export(
    checkpoint: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        checkpoint: Run folder, or one of its checkpoints.
        output: Folder to make; must not exist.
        dtype: Of the stored weights.
    """
    opened = open_checkpoint(checkpoint).verified()
    llama, context = opened.load(), opened.trained_context
    export_pretrained(llama, output, opened.tokenizer, context, getattr(torch, dtype))
    print(f"{llama.layers}, context {context:,}, tokenizer from {opened.tokenizer}")
    print(f"wrote {output}")
    return Path(output)
