"""Training code shared by all methods: the training step, phases, gradients, EMA, image pool, distributed strategies."""
