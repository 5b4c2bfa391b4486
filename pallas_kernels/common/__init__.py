"""What kernels of every kind share: which tiles there are, in which order, for which block."""
