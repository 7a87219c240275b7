"""Image operations: color, resizing, augmentation, crops."""
