"""Convergence studies: paired comparisons of training schemes of diffusion models."""
