"""`lit_longctx doctor`: what is installed, and which attention kernels run here."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from lit_longctx.model.attention import attention_backend, automatic

PACKAGES = (
    "lit_longctx torch torchvision lightning litdata torchmetrics jsonargparse tokenizers "
    "safetensors transformers flash-attn"
)

DRIVERS = {12: "525", 13: "580"}
"""Least driver for a major version of CUDA."""


def doctor() -> None:
    """Print versions, devices and the state of each attention back end."""
    print(f"python {platform.python_version()} on {platform.machine()}")
    for package in PACKAGES.split():
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    print(f"cpu threads {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if cuda := torch.version.cuda:
        driver = DRIVERS.get(int(cuda.split(".")[0]), "of the same CUDA version")
        print(f"torch is built for CUDA {cuda}: needs an NVIDIA driver {driver} or later")
    chosen, reason = automatic()
    why = f", as {reason}" if reason else " in bfloat16 and float16; else sdpa"
    print(f"attn_implementation auto: {chosen} here{why}")
    for name in ("sdpa", "flash_attention_2", "varlen", "flex_attention"):
        try:
            flash = getattr(attention_backend(name), "flash", "")
            print(f"attn_implementation {name}: ready{flash and f' (flash is {flash})'}")
        except (ImportError, ValueError) as error:
            print(f"attn_implementation {name}: {error}")
