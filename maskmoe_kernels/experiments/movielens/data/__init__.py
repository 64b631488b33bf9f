"""The data of MovieLens-1M: reading, the leave-one-out split, negatives, and ranking lists."""
