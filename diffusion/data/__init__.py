"""Datasets: preparation of images from any source, arrays on disk, batches."""
