"""What the methods of one task share: losses, evaluation and prediction steps."""
