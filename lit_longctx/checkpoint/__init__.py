"""Model folders: Hugging Face's, our own runs', Meta's; opened once, loaded, exported.

Nothing here unpickles a file that did not come from one of our runs.
"""

from lit_longctx.checkpoint.description import MODEL, describe, describe_layers, describe_position
from lit_longctx.checkpoint.export import export, export_pretrained
from lit_longctx.checkpoint.opening import Checkpoint, load_pretrained, open_checkpoint
from lit_longctx.checkpoint.verification import fault_in, newest_whole, steps_of

__all__ = [
    "MODEL",
    "Checkpoint",
    "describe",
    "describe_layers",
    "describe_position",
    "export",
    "export_pretrained",
    "fault_in",
    "load_pretrained",
    "newest_whole",
    "open_checkpoint",
    "steps_of",
]
