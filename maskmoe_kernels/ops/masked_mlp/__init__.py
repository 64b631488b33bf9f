"""Whole masked networks as registered ops."""
