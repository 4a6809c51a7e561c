"""Documents → batches: reading, tokenising, storing, ordering."""
