"""Evaluation: feature extractors, metrics of features, statistics of real images, probes of a checkpoint."""
