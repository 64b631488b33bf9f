"""The toy experiment (section 4.1)."""
