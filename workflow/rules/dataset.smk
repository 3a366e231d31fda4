# The images of any source become one array of squares of equal size.


# A Snakemake checkpoint: after it has run, Snakemake decides again which jobs must run. If the dataset was deleted and
# is prepared again with the same images, nothing is trained or evaluated again.
checkpoint dataset:
    output:
        images=layout.DATASET / "images.npy",
        manifest=layout.DATASET / "manifest.json",
    log:
        layout.DATASET / "prepare.log",
    conda:
        "../../environment.yml"
    resources:
        runtime=minutes(dataset_request),
        mem_mb=megabytes(dataset_request),
    params:
        dataset=lambda wildcards: layout.pixels(DATASETS[wildcards.dataset]),
    message:
        "Prepare the dataset {wildcards.dataset}"
    script:
        "../scripts/dataset.py"
