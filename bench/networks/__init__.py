"""Benchmarks of training whole networks."""
