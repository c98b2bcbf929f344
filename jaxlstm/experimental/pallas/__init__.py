"""The recurrence as Pallas kernels, one module per compiler and chip."""
