"""Datasets: preparation from images of any source, arrays on disk, batches."""
