"""What the methods compute, on batched tensors alone."""
