"""Microbenchmarks: our layers beside the best that can be written without them."""
