"""Reading and generating data sets."""
