"""What the tensors of one module mean, by storage."""
