"""Check your own models: the float64 definition, isolation assertions, hypothesis strategies."""
