"""Strict readers of the data sets the experiments use."""
