"""Batch → metrics."""
