"""Images as pixels, and pixels of a colour."""

import torch


def pixels(path):
    """The image, ``(height, width, 3)`` in 0..255; fails if it is no image."""
    from matplotlib.image import imread

    return (torch.from_numpy(imread(path)[..., :3].copy()) * 255).round().long()


def count(path, color, tolerance=3):
    """Pixels of that colour."""
    rgb = torch.tensor([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return int(((pixels(path) - rgb).abs().amax(-1) <= tolerance).sum())
