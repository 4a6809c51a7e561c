"""What a resumed run must have in common with the run that it goes on with, besides its data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lit_longctx.checkpoint import Checkpoint
from lit_longctx.model import LlamaConfig
from lit_longctx.model.layers import Layers


def check_same_model(
    resumed: Checkpoint, config: LlamaConfig, layers: Sequence[Layers] | None
) -> None:
    """Refuse a checkpoint of another model: one of fewer layers, say, would load silently.

    Args:
        resumed: The checkpoint.
        config: The run's model.
        layers: Layers of the run's stages, one of which the checkpoint must have; None: any.

    Raises:
        ValueError: They differ; it names the first field that does.
    """
    stored, ours = asdict(resumed.config), asdict(config)
    if layers is not None:  # which stage it is, the step tells
        stored["position"] = resumed.layers
        ours["position"] = resumed.layers if resumed.layers in layers else layers[0]
    for name in stored:
        if stored[name] != ours[name]:
            raise ValueError(
                f"{resumed.path} is of another model: expected {name} {ours[name]}, got "
                f"{stored[name]}; to begin a run with its weights, pass it as the model's "
                "checkpoint"
            )


def check_same_stages(step: int, stored: Any, ours: Any) -> None:
    """Refuse other stages than those that the run had until `step`."""
    if stored != ours:
        raise ValueError(
            f"until step {step} the run's stages were {stored}, the config's are {ours}; go on "
            "with those it began with"
        )
