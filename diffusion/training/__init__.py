"""Training: the state of a run, one optimiser step, segments between checkpoints, data-parallel processes."""
