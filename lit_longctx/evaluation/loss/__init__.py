"""Loss by position, length and source; sliding-window perplexity."""
