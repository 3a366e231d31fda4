# The images of any source become one array of squares of equal size.


# A checkpoint, because Snakemake then decides again, after the dataset is prepared, which jobs must run: none that has
# used the same images, if somebody deleted the dataset.
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
