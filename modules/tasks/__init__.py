"""Base classes per task: losses, evaluation and prediction steps."""
