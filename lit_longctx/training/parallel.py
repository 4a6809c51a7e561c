"""How a Llama is spread over processes, and its checkpoints, which are whole or refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from lit_longctx import manifest
from lit_longctx.checkpoint import (
    MODEL,
    Checkpoint,
    fault_in,
    newest_whole,
    open_checkpoint,
    steps_of,
)
from lit_longctx.checkpoint.unpickling import LOOP, check_pickles
from lit_longctx.context_parallel import ContextParallel, ContextParallelName, context_parallel
from lit_longctx.model import Llama
from lit_longctx.training.background import BackgroundWork, copied


def apply_sharding(
    llama: Llama, mesh: DeviceMesh, compute: torch.dtype, cpu_offload: bool = False
) -> None:
    """Shard every block, then the rest: embedding, final norm and head stay in the root group.

    Master weights stay in their dtype (float32), products run in `compute`, gradients are averaged
    in float32. Inputs are not cast: position codes need their float32. With `cpu_offload` weights,
    gradients and moments are in (pinned) host memory, and the optimizer steps there.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    pinned = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    offload = pinned if cpu_offload else OffloadPolicy()
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(llama, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for method in ("loss", "top1_correct", "logits"):
        register_fsdp_forward_method(llama, method)


def apply_compile(llama: Llama) -> None:
    """Compile every block's forward; the same few graphs serve all blocks and layouts of documents.

    To be applied first: what recomputes whole blocks must stand outside the compiled code, which
    it would otherwise keep from being compiled.
    """
    for block in llama.model.layers:
        block.forward = torch.compile(block.forward)


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, one or many, on CPU (gloo) or CUDA (NCCL).

    Checkpoints are folders `step-N`: written beside, hashed, flushed, renamed; the file `latest`
    is moved last. A folder that is torn or altered is refused by name before any weight of it is
    used.

    Args:
        context_parallel_size: Processes that divide each row among them; neighbours, best on one
            node.
        context_parallel: `zigzag`, chunks of each row and gathered keys and values; or `ulysses`,
            heads for tokens, where query heads divide.
        kv_heads_at_once: Key and value heads that zigzag gathers at a time; default: all.
        replicate_size: Copies of the sharded model; each is sharded over the processes that are
            left, say those of a node (HSDP).
        process_group_backend: `gloo` or `nccl`; default: by device.
        timeout_minutes: After how long a collective that a process never joins fails.
    """

    def __init__(
        self,
        context_parallel_size: int = 1,
        context_parallel: ContextParallelName = "zigzag",
        kv_heads_at_once: int | None = None,
        replicate_size: int = 1,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if min(context_parallel_size, replicate_size) < 1:
            raise ValueError(
                f"context_parallel_size {context_parallel_size} and replicate_size "
                f"{replicate_size} must be 1 or more"
            )
        self.context_parallel_size = context_parallel_size
        self.replicate_size = replicate_size
        self._context = (context_parallel, kv_heads_at_once)
        self.context: ContextParallel | None = None
        """How rows are divided; None where they are not."""
        self.sharding_mesh: DeviceMesh
        """Processes by replica and shard; context-parallel ones are shards like the others."""
        self.cpu_offload = False
        """Whether weights, gradients and moments are in host memory; the module says."""
        self.check_model: Callable[[Checkpoint], None] | None = None
        """Raises if a checkpoint to go on from is of another model; set by the module."""
        self.background: BackgroundWork | None = None
        """What writes checkpoints while training goes on; set by `checkpoints.async_save`."""

    def setup_environment(self) -> None:
        """Resolve the mesh size here: Lightning's own `auto` would mean tensor parallelism."""
        world = self._data_parallel_size = self.num_nodes * self.num_processes
        for name in ("context_parallel_size", "replicate_size"):
            if world % (size := getattr(self, name)):
                raise ValueError(f"{world} processes do not divide by {name} {size}")
        device = self.root_device.type
        self.cpu_offload = getattr(self.lightning_module, "cpu_offload", False)
        if self.cpu_offload and device == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms are summed where weights are
        super().setup_environment()
        self.sharding_mesh = self.device_mesh["data_parallel"]
        if self.replicate_size > 1:
            shape = (self.replicate_size, world // self.replicate_size)
            names = ("replicate", "shard")
            self.sharding_mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        if self.context_parallel_size > 1:
            shape = (world // self.context_parallel_size, self.context_parallel_size)
            mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "context"))
            name, at_once = self._context
            self.context = context_parallel(name, mesh.get_group("context"), at_once)

    @property
    def weights_device(self) -> torch.device:
        """Where shards of weights are."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def model_to_device(self) -> None:
        """Leave weights in host memory where they are offloaded to it."""
        if not self.cpu_offload:
            super().model_to_device()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of processes that read rows of their own, and which of them this is."""
        size = self.context_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save a folder that appears whole or not at all; with `background`, after this returns."""
        target = Path(self.broadcast(filepath))
        temporary = Path(self.broadcast(manifest.beside(target)))
        if self.background:
            self.background.do(partial(self._write, copied(checkpoint), temporary, target))
        else:
            self._write(checkpoint, temporary, target)

    def _write(self, checkpoint: dict[str, Any], temporary: Path, target: Path) -> None:
        """Write beside, hash, rename into place, and move `latest`."""
        group = self.background.group if self.background else None
        barrier = partial(torch.distributed.barrier, group) if group else self.barrier
        description = checkpoint.pop("model_description", None)
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        for i, moments in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors[f"optimizer_{i}"] = moments
        with whole_or_nothing(temporary, target):
            temporary.mkdir(parents=True, exist_ok=True)
            dcp.save(tensors, checkpoint_id=temporary, process_group=group)
            if self.global_rank == 0:
                torch.save(checkpoint, temporary / LOOP)
                if description:
                    manifest.write_text(temporary / MODEL, json.dumps(description, indent=1) + "\n")
            barrier()
            hashes = self._hash_share(temporary, group)
            if self.global_rank == 0:
                manifest.seal(temporary, hashes)
                old = manifest.beside(target)
                if again := target.exists():  # the same step, after a resume from before it
                    target.rename(old)
                manifest.publish(temporary, target)
                if again:
                    shutil.rmtree(old)
        if self.global_rank == 0:
            manifest.write_text(target.parent / "latest", target.name + "\n")
        barrier()

    def _hash_share(self, folder: Path, group: ProcessGroup | None) -> dict[str, str]:
        """Hash the folder's files, each rank its share, and give all of them to everyone."""
        mine = manifest.hash_files(folder, self.global_rank, self.world_size)
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, mine, group)
        return {name: value for part in gathered for name, value in part.items()}

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify, then load, resharded to this layout.

        A run's `checkpoints` stand for the newest of them that is whole.
        """
        path = Path(self.broadcast(checkpoint_path))
        trainer = self.lightning_module.trainer  # pyright: ignore[reportOptionalMemberAccess]
        fits = trainer.state.fn == "fit"
        if path.name == "checkpoints":
            opened = open_checkpoint(newest_whole(path))
        else:
            opened = open_checkpoint(path).verified()
            if fits and path.resolve().parent == run_checkpoints(trainer).resolve():
                refuse_abandoned(path)
        if self.global_rank == 0 and fits:
            print(f"going on from {opened.path}", flush=True)
        if self.check_model is not None:
            self.check_model(opened)
        check_pickles(opened.path)
        with plain_errors():
            return super().load_checkpoint(opened.path, weights_only=weights_only)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint, its manifest first: half deleted it is no checkpoint."""
        if self.global_rank == 0:
            (Path(filepath) / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(filepath, ignore_errors=True)


def run_checkpoints(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(trainer.default_root_dir) / "checkpoints"


def refuse_abandoned(path: Path) -> None:
    """Refuse a checkpoint with newer whole ones: `last` would later go on from those."""
    for newer in steps_of(path.parent):
        if newer.name > path.name and fault_in(newer) is None:
            raise ValueError(
                f"{path} has newer checkpoints beside it, up to {newer.name}; remove them, "
                "or choose another --trainer.default_root_dir"
            )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what went wrong in a distributed checkpoint, not torch's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        fault, _ = next(iter(error.failures.values()))
        raise fault from error


@contextmanager
def whole_or_nothing(temporary: Path, target: Path) -> Iterator[None]:
    """Remove what was half saved; say so in one line where the disk would not take it.

    torch's writer tells of its own file positions only, whatever the disk's error was.
    """
    try:
        with plain_errors():
            yield
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        why = error.strerror if isinstance(error, OSError) else "the disk or a quota is full"
        free = shutil.disk_usage(target.parent).free / 1e6
        raise OSError(
            f"{target} was not saved: {why}; {free:,.0f} MB are free there; older checkpoints are "
            "whole: make room and go on with --ckpt_path last"
        ) from error
