"""The nets: the ADM U-Net, its norm, and GPU kernels."""
