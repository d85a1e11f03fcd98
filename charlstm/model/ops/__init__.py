"""Building blocks of the cells and the model: matmuls, loops over a window, GPU kernels, compiler options."""
