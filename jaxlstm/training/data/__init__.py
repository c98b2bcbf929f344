"""Reads and generates data sets."""
