# Pictures from anywhere become one array of equal squares.


rule dataset:
    output:
        images="results/datasets/{dataset}/images.npy",
        manifest="results/datasets/{dataset}/manifest.json",
    log:
        "results/datasets/{dataset}/prepare.log",
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
