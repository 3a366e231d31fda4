"""The statistics of a study, from tables of metrics to the verdict."""
