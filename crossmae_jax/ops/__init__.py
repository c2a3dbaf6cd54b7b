"""Kernels: one function per operation, whatever the hardware."""
