"""Extend Llama-type language models to long context, and be able to believe the result."""

__version__ = "0.1.0"
