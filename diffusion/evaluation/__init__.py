"""Evaluation: feature extractors, metrics of features, references, probes of a checkpoint."""
