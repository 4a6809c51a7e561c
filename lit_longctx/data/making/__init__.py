"""Make data: prepare, mix, filter by dependency, interleave, extend by negatives, synthesize."""
