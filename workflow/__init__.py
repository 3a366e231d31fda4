"""The study around `diffusion`: jobs, statistics, figures, reports and the commands beside Snakemake."""
