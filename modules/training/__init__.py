"""The training step that all methods share: phases, gradients, EMA, image pool, several devices."""
