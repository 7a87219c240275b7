"""Read image files and folders into tensors."""
