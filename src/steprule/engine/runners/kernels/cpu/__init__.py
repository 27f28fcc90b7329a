"""Kernels for the CPU, compiled by LLVM."""
