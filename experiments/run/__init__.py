"""Commands that use a model: fit, validate, test, predict, sample, reconstruct and others."""
