"""Diffusion training schemes under study: the mathematics, the network, training, sampling and evaluation.

Nothing in this package knows of Snakemake or MLflow.
"""


class StudyError(Exception):
    """A mistake of the user or the machine, told in one sentence: what, where, and what to do about it."""


class Stopped(Exception):
    """A long work was asked to stop and has saved how far it came."""
