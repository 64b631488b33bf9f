"""From the official csv files to checked shards, and from those to batches of sessions."""
