"""What the tensors of one module mean, by the kind of its weight."""
