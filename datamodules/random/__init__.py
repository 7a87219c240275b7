"""Counter-based random numbers: a function of (seed, stream, position)."""
