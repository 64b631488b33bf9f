"""What the experiments share: training loop, checkpoints, metrics, reports, figures."""
