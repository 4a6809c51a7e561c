"""LightningModules: the model, its optimizer, a training step, validation, checks on resume."""

from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_only

from lit_longctx.batch import StepBatch
from lit_longctx.checkpoint import (
    Checkpoint,
    describe,
    describe_layers,
    open_checkpoint,
    parameters,
)
from lit_longctx.context_parallel import ContextParallel, apply_context_parallel
from lit_longctx.data.sampling.data_description import TrainingData
from lit_longctx.data.sampling.stages import Stage
from lit_longctx.data.tokens.opening import check_tokenizer
from lit_longctx.model import Llama, LlamaConfig, layers_of
from lit_longctx.model.attention import AttnImplementation
from lit_longctx.model.keys import OWN, KeySource
from lit_longctx.model.layers import LayerPattern, Layers
from lit_longctx.model.memory import Memory
from lit_longctx.position import PositionScheme, RoPE
from lit_longctx.progress import say
from lit_longctx.training import parallel
from lit_longctx.training.activations import Offload, Recompute, apply_levers, check_levers
from lit_longctx.training.held_out import HeldOutValidation
from lit_longctx.training.long_ce import LongCE
from lit_longctx.training.optimizers import (
    OptimizerName,
    carry_moments,
    make_optimizer,
    set_learning_rate,
)
from lit_longctx.training.resume import check_same_model, check_same_stages
from lit_longctx.training.schedule import Schedule, WarmupCosine
from lit_longctx.training.settings import StageSettings
from lit_longctx.training.spikes import SpikeGuard
from lit_longctx.training.step import StepResult, accumulate_gradients, describe_blow_up


class LanguageModule(HeldOutValidation, ABC):
    """What every kind of training shares; the data module owns the loss weights, this sums them.

    Args:
        checkpoint: Hugging Face folder or run folder to start from.
        config: Shape of a model with random weights, in place of a checkpoint.
        position: Position scheme of all layers, or a pattern of kinds of layers: `layers`, their
            names in order, and `kinds`, scheme and window of each name. theta and original_context
            that are left open are the checkpoint's. Default: the checkpoint's, or RoPE.
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning rate by step.
        weight_decay: Of matrices; norms and biases are never decayed.
        decay_embeddings: Whether the embedding decays too; OLMo and SmolLM3 leave it out.
        betas: AdamW's decay rates of first and second moment.
        gradient_clip: Largest gradient norm.
        compute_dtype: Dtype of products; master weights and gradient sums are float32.
        recompute: What backward computes again: `none`; `elementwise`, norms and SiLU;
            `attention_kept`, whole blocks but their attention; `block`, whole blocks, for the least
            memory and a third more compute.
        offload: `block_inputs` keeps what blocks are recomputed from in host memory.
        mlp_tile_tokens: Tokens that an MLP computes at a time, and again in backward; default: all.
        head_chunk_tokens: Tokens whose logits exist at a time; default: as many as fit 512 MiB in
            float32 (32 MiB on a CPU).
        optimizer: `adamw`; `adamw_bf16_moments`, both moments in bfloat16; `adamw8bit`, torchao's.
        cpu_offload: Keep weights, gradients and moments in host memory and step there (FSDP2).
        carry_optimizer: Begin with the moments and step counts of the run that `checkpoint` names,
            in place of none.
        spike_guard: Leave out updates whose loss or gradient norm is far above those before.
        long_ce: Weigh targets by how much likelier their full context makes them (LongCE).
        compile: torch.compile every block.
        seed: Decides random weights.
        memory: Windows that each row remembers (Transformer-XL); needs data with contiguous rows.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        config: LlamaConfig | None = None,
        position: PositionScheme | LayerPattern | None = None,
        attn_implementation: AttnImplementation = "auto",
        learning_rate: float = 2e-5,
        schedule: Schedule = WarmupCosine(),
        weight_decay: float = 0.1,
        decay_embeddings: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_clip: float = 1.0,
        compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        recompute: Recompute = "elementwise",
        offload: Offload = "none",
        mlp_tile_tokens: int | None = None,
        head_chunk_tokens: int | None = None,
        optimizer: OptimizerName = "adamw",
        cpu_offload: bool = False,
        carry_optimizer: bool = False,
        spike_guard: SpikeGuard | None = None,
        long_ce: LongCE | None = None,
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
        self.start = None if checkpoint is None else open_checkpoint(checkpoint)
        config = config if self.start is None else self.start.config
        assert config is not None
        self.config = config
        self.layers = self._layers_with(position)
        self._settings: StageSettings | None = None
        self.attn_implementation: AttnImplementation = attn_implementation
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.decay_embeddings = decay_embeddings
        self.betas = betas
        self.gradient_clip = gradient_clip
        self.compute_dtype: torch.dtype = getattr(torch, compute_dtype)
        check_levers(recompute, offload, mlp_tile_tokens, head_chunk_tokens)
        self.recompute: Recompute = recompute
        self.offload: Offload = offload
        self.mlp_tile_tokens = mlp_tile_tokens
        self.head_chunk_tokens = head_chunk_tokens
        self.optimizer_name: OptimizerName = optimizer
        self.cpu_offload = cpu_offload
        if carry_optimizer and (self.start is None or not parameters.is_run(self.start.path)):
            raise ValueError(
                f"carry_optimizer needs a run folder as the model's checkpoint; got {checkpoint}"
            )
        self.carry_optimizer = carry_optimizer
        self.spike_guard = spike_guard
        if long_ce and memory:
            raise ValueError("long_ce needs rows that remember nothing; set memory 0")
        self.long_ce = long_ce
        self.compile_blocks = compile
        self.seed = seed
        self.memory = memory
        self.memories: list[Memory] = []
        self.context_parallel: ContextParallel | None = None
        self._told = False
        self.samples_consumed = 0

    # ---- the model

    def configure_model(self) -> None:
        """Build on the meta device, shard, then fill each rank's shards."""
        if self.llama is not None:
            return
        self._check_data()
        if self.trainer.state.fn == "fit" and self.trainer.max_steps > 0:
            self.settings.check(self.trainer.max_steps)
        with torch.device("meta"):
            llama = Llama(self.config, self.layers, self.attn_implementation)
        if self.trainer.state.fn == "fit":
            for layers in reversed(self.settings.layers):  # refuse what a later stage cannot be
                llama.use_layers(layers)
        if self.compile_blocks:
            parallel.apply_compile(llama)
        apply_levers(
            llama, self.recompute, self.offload, self.mlp_tile_tokens, self.head_chunk_tokens
        )
        strategy = self.trainer.strategy
        device = strategy.root_device
        if isinstance(strategy, parallel.FSDP2Strategy):
            if (context := strategy.context) is not None:
                apply_context_parallel(llama, context)
                self.context_parallel = context
            mesh = strategy.sharding_mesh
            parallel.apply_sharding(llama, mesh, self.compute_dtype, self.cpu_offload)
            strategy.check_model = self._check_resumed
            device = strategy.weights_device
        llama.to_empty(device=device)
        fresh = parameters.fill(llama, self._whole_start(), self.seed)
        llama.start = self.start
        self.llama = llama
        self._announce(fresh)

    def _whole_start(self) -> Path | None:
        """Return the folder of the first weights; its files are hashed here, and only here."""
        if self.start is None:
            return None
        whole = self.start.verified()
        if (whole.config, whole.layers) != (self.start.config, self.start.layers):
            raise ValueError(
                f"{self.start.path} is torn, and {whole.path} before it is of another model; "
                "name that one as the model's checkpoint"
            )
        self.start = whole
        return whole.path

    def _check_data(self) -> None:
        data, strategy = self.data, self.trainer.strategy
        if self.memory and not data.contiguous:
            raise ValueError(
                "memory needs rows that walk through documents; set data's contiguous true"
            )
        if self.memory and isinstance(strategy, parallel.FSDP2Strategy) and strategy.context:
            raise ValueError("a memory needs whole rows; set memory 0, or context_parallel_size 1")
        if self.long_ce and isinstance(strategy, parallel.FSDP2Strategy) and strategy.context:
            raise ValueError("long_ce needs whole rows; set context_parallel_size 1")
        if self.memory and self.layers.depend_on_length:
            raise ValueError(f"{self.layers} cannot have a memory; set memory 0")
        if data.tokenizer:
            folder = self.start and self.start.tokenizer
            check_tokenizer(data.tokenizer, self.config.vocab_size, folder)

    @rank_zero_only
    def _announce(self, fresh: list[str]) -> None:
        assert self.llama is not None
        number = sum(p.numel() for p in self.llama.parameters())
        print(f"model: {number:,} parameters from {self._whole_start() or 'random weights'}")
        before = (
            f"{self.start.layers} → " if self.start and self.start.layers != self.layers else ""
        )
        print(f"position: {before}{self.layers}")
        if self.start is not None and fresh:
            layers = {int(name.split(".")[2]) for name in fresh}
            names = sorted({type(self.layers.position_of(i)).__name__ for i in layers})
            print(f"model: {len(fresh)} weights of {', '.join(names)} start anew")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; matrices decay, vectors (norms, biases) do not."""
        decayed, others = [], []
        for name, parameter in self.named_parameters():
            vector = parameter.ndim < 2 or "bias" in name
            left_out = "embed_tokens" in name and not self.decay_embeddings
            if parameter.requires_grad:
                (others if vector or left_out else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = self.cpu_offload or None  # on a CPU much faster than torch's default
        return make_optimizer(self.optimizer_name, groups, self.learning_rate, self.betas, fused)

    def on_train_start(self) -> None:
        """Take up the moments of the start, unless the run goes on with its own."""
        if self.carry_optimizer and self.global_step == 0:
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            folder = self._whole_start()
            assert folder is not None
            carry_moments(self, optimizer.optimizer, folder)
            rank_zero_only(print)(f"optimizer: moments and step counts from {folder}")

    # ---- one step

    def training_step(self, step: StepBatch, step_index: int) -> None:
        """Run all micro-batches of an optimizer step and update."""
        assert self.llama is not None
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if self.context_parallel is not None and not self._told:
            self._tell_balance(self.context_parallel, step)
        settings = self.settings
        self.llama.use_layers(settings.layers_at(self.global_step))
        if settings.is_fresh(self.global_step):
            optimizer.optimizer.state.clear()
        found = accumulate_gradients(
            self.llama,
            step.micro_batches,
            self._sources(step),
            self.manual_backward,
            self.gradient_clip,
            context_parallel_size=self.context_parallel_size,
            long_ce=self.long_ce,
        )
        spike = self._is_spike(found)
        if not found.is_finite and not spike:
            optimizer.zero_grad()
            raise FloatingPointError(describe_blow_up(self.global_step, step, found))
        rate = settings.learning_rate_at(self.global_step, self.trainer.max_steps)
        set_learning_rate(optimizer, rate)
        if spike:
            optimizer.zero_grad()  # without gradients the step below changes nothing
        optimizer.step()
        optimizer.zero_grad()
        self._count(step.next_sample)
        values = {
            "loss": found.loss.float(),
            "grad_norm": found.grad_norm,
            "lr": rate,
            "tokens": float(step.next_token),
        }
        if self.spike_guard is not None:
            values["skipped_steps"] = float(self.spike_guard.skipped)
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self._log_step()

    def _is_spike(self, found: StepResult) -> bool:
        """Whether the update is to be left out, which is said; all processes follow the first."""
        if self.spike_guard is None:
            return False
        loss, norm = float(found.loss), float(found.grad_norm)
        spike = self.trainer.strategy.broadcast(self.spike_guard.is_spike(loss, norm))
        if spike:
            rank_zero_only(say)(
                f"step {self.global_step}: no update, as loss {loss:.4g} or gradient norm "
                f"{norm:.4g} is a spike ({self.spike_guard.skipped} skipped so far)"
            )
        return spike

    def _tell_balance(self, context: ContextParallel, step: StepBatch) -> None:
        """Say how evenly the documents of a first step give the processes attention to do."""
        self._told = True
        found = [context.imbalance(batch) for batch in step.micro_batches]
        rank_zero_only(print)(
            f"context parallelism: {type(context).__name__.lower()} over {context.size} processes; "
            f"the busiest does {sum(found) / len(found):.2f} × its share of attention"
        )

    @property
    def context_parallel_size(self) -> int:
        """Processes that have the same rows as this one, itself among them."""
        return 1 if self.context_parallel is None else self.context_parallel.size

    @property
    def settings(self) -> StageSettings:
        """Layers, learning rate and optimizer state of every step."""
        schedule = self.data.stage_schedule
        if self._settings is None or self._settings.stage_schedule is not schedule:
            layers = [self._layers_in(stage) for stage in schedule.stages]
            self._settings = StageSettings(schedule, layers, self.learning_rate, self.schedule)
        return self._settings

    def _layers_in(self, stage: Stage) -> Layers:
        """Return the layers of a stage: a position of its own, a theta of its own, or the run's."""
        layers = self.layers if stage.position is None else self._layers_with(stage.position)
        return layers if stage.theta is None else layers.with_theta(stage.theta)

    def _layers_with(self, position: PositionScheme | LayerPattern | None) -> Layers:
        """Return the layers that a position makes of the start, or of random weights."""
        if self.start is not None:
            return self.start.layers_with(position)
        return layers_of(position or RoPE(), self.config)

    def _sources(self, step: StepBatch) -> Sequence[KeySource]:
        """Return the memory of each micro-batch's rows, if any; empty where rows jump."""
        if not self.memory:
            return [OWN] * len(step.micro_batches)
        if not self.memories and self.global_step:
            rank_zero_only(print)(f"step {self.global_step}: resumed with an empty memory")
        if step.restart or not self.memories:
            tokens = self.memory * step.micro_batches[0].input_ids.shape[1]
            self.memories = [Memory(tokens) for _ in step.micro_batches]
        return self.memories

    def _count(self, samples: int) -> None:
        """Take note, here and in the data, of how many samples the run has read."""
        self.samples_consumed = samples
        if isinstance(data := getattr(self.trainer, "datamodule", None), TrainingData):
            data.samples_consumed = samples

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the data's whole state, one number, and what the model is."""
        assert self.llama is not None
        data = self.data
        checkpoint["samples_consumed"] = self.samples_consumed
        checkpoint["stages"] = data.stages_until(self.global_step)
        checkpoint["data"] = data.identity
        if self.spike_guard is not None:
            checkpoint["spike_guard"] = self.spike_guard.state_dict()
        before = self.start.trained_context if self.start else None
        trained = (before, data.context, data.window_until(self.global_step))
        context = max((tokens for tokens in trained if tokens is not None), default=None)
        checkpoint["model_description"] = {
            **describe(self.llama, context),
            "started_from": self._started_from(),
            "tokenizer": data.tokenizer and data.tokenizer.as_json(),
        }

    def _started_from(self) -> dict[str, Any] | None:
        if self.start is None:
            return None
        context, _ = self.start.context_with(self.start.layers)
        layers = describe_layers(self.start.layers)
        return {"checkpoint": str(self.start.path), **layers, "context": context}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the count of samples, and the layers of the last step that was trained."""
        assert self.llama is not None
        self._count(checkpoint["samples_consumed"])
        self.loaded_step = step = checkpoint["global_step"]
        if self.spike_guard is not None and "spike_guard" in checkpoint:
            self.spike_guard.load_state_dict(checkpoint["spike_guard"])
        if self.trainer.state.fn == "fit":
            self.data.check_resumed(checkpoint.get("data"))
            check_same_stages(step, checkpoint.get("stages"), self.data.stages_until(step))
        self.llama.use_layers(self.settings.layers_at(max(0, step - 1)))

    def _check_resumed(self, resumed: Checkpoint) -> None:
        """Refuse a checkpoint of another model: one of fewer layers, say, would load silently."""
        # what only measures may place tokens anew
        layers = self.settings.layers if self.trainer.state.fn == "fit" else None
        check_same_model(resumed, self.config, layers)


@final
class ContinualPretrain(LanguageModule):
    """Next-token prediction on packed documents, from a checkpoint or from random weights."""


@final
class SFT(LanguageModule):
    """Next-token prediction on conversations; `FinetuneData` says which targets count how much."""
