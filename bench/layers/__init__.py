"""The benchmark of single layers against rivals."""
