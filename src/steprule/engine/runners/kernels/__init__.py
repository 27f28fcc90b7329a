"""Fused kernels: what both printers and both launches share."""
