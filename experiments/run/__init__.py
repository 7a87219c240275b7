"""Commands that build a model: fit, evaluate, predict, sample, reconstruct."""
