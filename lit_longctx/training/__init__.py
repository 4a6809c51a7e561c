"""Batch → step."""
