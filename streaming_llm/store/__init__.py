"""What the cache keeps: the stacks, which are the only owners of tensors."""
