"""What is known of the GPU kernels without a GPU: every launch recorded, compiled, judged."""
