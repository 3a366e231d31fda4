"""The ADM U-Net, its group norm, and GPU kernels."""
