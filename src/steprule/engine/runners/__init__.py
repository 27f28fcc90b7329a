"""What can run a program: the reference, lists of tensors, single rows, and kernels."""
