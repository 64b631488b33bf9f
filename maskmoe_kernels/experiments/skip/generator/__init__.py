"""Generated sessions in the official csv format, whose labels have known causes."""
