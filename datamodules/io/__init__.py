"""Reading image files and folders into tensors."""
