"""Experimental: the recurrence as Pallas kernels for TPUs and Hopper GPUs, one module per compiler and chip."""
