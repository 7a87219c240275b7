"""Images of training examples and predictions."""
