"""Batch → step: token-exact loss under accumulation and ranks, clipping, AdamW."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_longctx.attention import AttnImplementation
from lit_longctx.batch import Batch, Step
from lit_longctx.checkpoint import (
    describe,
    describe_position,
    fill,
    read_model,
    resolve,
    tokenizer_folder,
    trained_context,
)
from lit_longctx.data.stages import ENDLESS, Course, Stage
from lit_longctx.data.tokenizer import check_tokenizer
from lit_longctx.evaluation.metrics import LossByPosition
from lit_longctx.keys import OWN, KeySource
from lit_longctx.layers import Layers
from lit_longctx.memory import Memory
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionScheme, RoPE
from lit_longctx.training import parallel
from lit_longctx.training.schedule import Schedule, WarmupCosine


class LanguageModule(LightningModule, ABC):
    """What every kind of training shares; the data module owns the loss weights, this sums them.

    Args:
        checkpoint: Hugging Face folder or run folder to start from.
        config: Shape of a model with random weights, in place of a checkpoint.
        position: Position scheme; default: the checkpoint's, or RoPE.
        attn_implementation: Attention back end.
        learning_rate: Peak learning rate of AdamW.
        schedule: Course of the learning rate.
        weight_decay: Of matrices; norms and biases are never decayed.
        betas: AdamW's decay rates of first and second moment.
        gradient_clip: Largest gradient norm.
        compute_dtype: Dtype of products; master weights and gradient sums are float32.
        activation_checkpointing: Recompute blocks in backward: less memory, a third more compute.
        compile: torch.compile every block.
        seed: Decides random weights.
        memory: Windows that each row remembers (Transformer-XL's recurrence); needs data in lanes.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        config: LlamaConfig | None = None,
        position: PositionScheme | None = None,
        attn_implementation: AttnImplementation = "sdpa",
        learning_rate: float = 2e-5,
        schedule: Schedule = WarmupCosine(),
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_clip: float = 1.0,
        compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        activation_checkpointing: bool = False,
        compile: bool = False,
        seed: int = 0,
        memory: int = 0,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (config is None):
            raise ValueError(
                "give either a checkpoint to start from or a config for random weights"
            )
        self.automatic_optimization = False
        self.start = None if checkpoint is None else resolve(checkpoint)
        own = RoPE()
        if self.start is not None:
            config, own = read_model(self.start)
        assert config is not None
        self.config = config
        self.origin = own if checkpoint else None
        self.position = position or own
        self.attn_implementation: AttnImplementation = attn_implementation
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.betas = betas
        self.gradient_clip = gradient_clip
        self.compute_dtype: torch.dtype = getattr(torch, compute_dtype)
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.seed = seed
        self.memory = memory
        self.memories: list[Memory] = []
        self.samples_consumed = 0
        self.llama: Llama | None = None
        self.held_out_loss: LossByPosition | None = None

    # ---- the model

    def configure_model(self) -> None:
        """Build on the meta device, shard, then fill each rank's shards."""
        if self.llama is not None:
            return
        self._check_data()
        with torch.device("meta"):
            llama = Llama(self.config, self.position, self.attn_implementation)
        parallel.apply_recompute(llama)
        if self.activation_checkpointing:
            parallel.apply_activation_checkpointing(llama)
        if self.compile_blocks:
            parallel.apply_compile(llama)
        if isinstance(self.trainer.strategy, parallel.FSDP2Strategy):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            parallel.apply_sharding(llama, mesh, self.compute_dtype)
        llama.to_empty(device=self.trainer.strategy.root_device)
        fresh = fill(llama, self.start, self.seed)
        self.llama = llama
        self._announce(fresh)

    def _check_data(self) -> None:
        data = self._data
        tokenizer = getattr(data, "tokenizer", None)
        if self.memory and not getattr(data, "lanes", False):
            raise ValueError("memory needs rows that walk through documents; set data's lanes true")
        if self.memory and self.position.depends_on_length:
            raise ValueError(f"{type(self.position).__name__} cannot have a memory; set memory 0")
        if tokenizer:
            folder = tokenizer_folder(self.start) if self.start else None
            check_tokenizer(tokenizer, self.config.vocab_size, folder)

    @rank_zero_only
    def _announce(self, fresh: list[str]) -> None:
        assert self.llama is not None
        number = sum(p.numel() for p in self.llama.parameters())
        origin = self.start or "random weights"
        print(f"model: {number:,} parameters from {origin}")
        before = f"{self.origin} → " if self.origin not in (None, self.position) else ""
        print(f"position: {before}{self.position}")
        if self.start is not None and fresh:
            print(f"model: {len(fresh)} weights of {type(self.position).__name__} start anew")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, vectors (norms, biases) do not."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        vectors = [p for n, p in named if p.ndim < 2 or "bias" in n]
        matrices = [p for n, p in named if not (p.ndim < 2 or "bias" in n)]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)

    # ---- one step

    def training_step(self, step: Step, step_index: int) -> None:
        """Run all micro-batches of an optimizer step and update.

        Each micro-batch backpropagates Σ nats·w · G / W, with G the ranks that FSDP averages over
        and W the weights of all their micro-batches: the mean over targets, however they are
        spread.
        """
        assert self.llama is not None
        self.llama.layers = Layers.alike(
            self.position_at(self.global_step), self.config.num_hidden_layers
        )
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        weights = sum(
            (b.loss_weights.sum(dtype=torch.float64) for b in step.micro_batches), self._zero()
        )
        total = self._sum_over_ranks(weights).clamp(min=1e-8)  # no target at all: loss 0, not NaN
        ranks = self.trainer.world_size
        loss = self._zero()
        for batch, memory in zip(step.micro_batches, self._memories(step), strict=True):
            summed, _ = self.llama.loss(batch, memory)
            self.manual_backward(summed * (ranks / total).to(summed.dtype))
            loss += summed.detach()
        mean = self._sum_over_ranks(loss) / total
        norm = self._clip()
        if not (mean.isfinite() and norm.isfinite()):
            optimizer.zero_grad()
            raise FloatingPointError(self._describe_blow_up(step, float(mean), float(norm)))
        rate = self._learning_rate(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        self.samples_consumed = step.next_sample
        self._log_step(mean=mean, norm=norm, rate=rate, tokens=step.next_token)

    @property
    def _data(self) -> Any:
        """The data module, if there is one; any may come, so only ask it for what it may lack."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def course(self) -> Course:
        """The run's stages, of which the data knows; one without end where it knows of none."""
        return getattr(self._data, "course", Course([Stage(ENDLESS, 1, 1)]))

    def position_at(self, step: int) -> PositionScheme:
        """Return the position scheme of a step: a stage may have its own theta."""
        theta = self.course.stages[self.course.at(step)].theta
        return self.position if theta is None else replace(cast(Any, self.position), theta=theta)

    def positions(self) -> list[PositionScheme]:
        """Return the position scheme of every stage."""
        return [self.position_at(step) for step in self.course.steps[:-1]]

    def _learning_rate(self, step: int) -> float:
        """Return the rate of a step: of the run's schedule, or of the stage's own."""
        number = self.course.at(step)
        own, begin = self.course.stages[number], self.course.steps[number]
        if own.learning_rate is None:
            return self.learning_rate * self.schedule.factor(step, self.trainer.max_steps)
        return own.learning_rate * self.schedule.factor(step - begin, own.steps)

    def _memories(self, step: Step) -> Sequence[KeySource]:
        """Return the memory of each micro-batch's rows; empty at first and where rows jump."""
        if not self.memory:
            return [OWN] * len(step.micro_batches)
        if not self.memories and self.global_step:
            rank_zero_only(print)(f"step {self.global_step}: resumed with an empty memory")
        if step.restart or not self.memories:
            tokens = self.memory * step.micro_batches[0].input_ids.shape[1]
            self.memories = [Memory(tokens) for _ in step.micro_batches]
        return self.memories

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        value = value.clone()
        if dist.is_initialized():
            dist.all_reduce(value)
        return value

    def _clip(self) -> Tensor:
        """Scale gradients to at most `gradient_clip`; return their norm before."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _describe_blow_up(self, step: Step, loss: float, norm: float) -> str:
        samples = [int(s) for batch in step.micro_batches for s in batch.samples]
        return (
            f"step {self.global_step}: loss {loss}, gradient norm {norm}, samples {samples[0]} to "
            f"{samples[-1]} on rank {self.global_rank}; weights are as before the step; "
            "resume from the last checkpoint with a lower learning rate"
        )

    def _log_step(self, mean: Tensor, norm: Tensor, rate: float, tokens: int) -> None:
        values = {"loss": mean.float(), "grad_norm": norm, "lr": rate, "tokens": float(tokens)}
        self.log_dict({f"train/{name}": value for name, value in values.items()})

    # ---- validation

    def on_validation_start(self) -> None:
        """Start counting anew."""
        names = list(getattr(self._data, "sources", {"data": None}))
        window = getattr(self._data, "window", 4096)
        self.held_out_loss = LossByPosition(names, window).to(self.device)

    on_test_start = on_validation_start

    def validation_step(self, batch: Batch, index: int) -> None:
        """Count nats by position and source."""
        assert self.llama is not None
        assert self.held_out_loss is not None
        self.held_out_loss.update(self.llama.loss(batch)[1], batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log what was counted, over all ranks."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the same under the test's name."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        assert self.held_out_loss is not None
        self.log_dict(self.held_out_loss.scalars(prefix), sync_dist=False)
        self.held_out_loss = None

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the data's whole state, one number, and what the model is."""
        assert self.llama is not None
        data = self._data
        checkpoint["samples_consumed"] = self.samples_consumed
        checkpoint["stages"] = self._begun(self.global_step)
        checkpoint["model_description"] = {
            **describe(self.llama, self._longest_window()),
            "started_from": self._started_from(),
            "tokenizer": getattr(data, "tokenizer", None),
        }

    def _longest_window(self) -> int | None:
        """Tokens of the longest context that the run has seen, if the data says."""
        if places := getattr(self._data, "places", None):
            return places.context
        if not hasattr(self._data, "course"):
            return getattr(self._data, "window", None)
        last = self.course.at(max(0, self.global_step - 1))
        seen = max(stage.window for stage in self.course.stages[: last + 1])
        if isinstance(self, SFT) and self.start is not None and self.position == self.origin:
            return max(seen, trained_context(self.start))  # short chats take no context away
        return seen

    def _started_from(self) -> dict[str, Any] | None:
        if self.start is None or self.origin is None:
            return None
        return {"checkpoint": str(self.start), "position": describe_position(self.origin)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the count of samples, and the places of the last step that was trained."""
        assert self.llama is not None
        self.samples_consumed = checkpoint["samples_consumed"]
        step = checkpoint["global_step"]
        held, ours = checkpoint.get("stages"), self._begun(step)
        if self.trainer.state.fn == "fit" and held != ours:
            raise ValueError(
                f"until step {step} the run's stages were {held}, the config's are {ours}; go on "
                "with those it began with"
            )
        self.llama.layers = Layers.alike(
            self.position_at(max(0, step - 1)), self.config.num_hidden_layers
        )

    def _begun(self, step: int) -> list[dict[str, Any]]:
        """Return what decided the first steps of a run in stages: all of the stages that ended."""
        if not getattr(self._data, "staged", False):
            return []
        last = self.course.at(max(0, step - 1))
        begun = [asdict(stage) for stage in self.course.stages[: last + 1]]
        for stage in begun:
            del stage["micro_batch_size"]
        del begun[-1]["steps"]  # the stage that goes on may become longer or shorter
        return begun

    @property
    def tokenizer_folder(self) -> Path | None:
        """Tokenizer of the data, to be kept with the run."""
        return getattr(self._data, "tokenizer_folder", None)


@final
class ContinualPretrain(LanguageModule):
    """Next-token prediction on packed documents, from a checkpoint or from random weights."""


@final
class SFT(LanguageModule):
    """Next-token prediction on conversations; `FinetuneData` says which targets count how much."""
