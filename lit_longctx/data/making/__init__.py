"""Make data: prepare, mix, filter by dependency, interleave, synthesize."""
