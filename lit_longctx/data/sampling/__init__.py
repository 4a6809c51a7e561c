"""Which windows a step reads, at which positions and weights: index, packing, stages."""
