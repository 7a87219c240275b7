"""Writers of predictions to files."""
