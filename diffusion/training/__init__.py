"""Training of one run: its state, one optimizer step, segments between checkpoints, data-parallel processes."""
