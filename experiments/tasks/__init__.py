"""Task-specific parts of the commands `predict` and `bench`."""
