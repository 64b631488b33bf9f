"""Experiments of the paper: data, training, metrics and figures."""
