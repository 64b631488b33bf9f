"""Ways to compute the registered ops; ``choice`` decides between them and says why."""
