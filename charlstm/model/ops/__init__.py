"""What the cells and the model are computed with: matrix products, loops over a window, GPU kernels."""
