"""What the experiments share: training loop, checkpoints, reports, figures."""
