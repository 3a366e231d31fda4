"""Training: the state of a run, one optimizer step, segments between checkpoints, data-parallel processes."""
