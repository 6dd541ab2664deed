"""torch's own test machinery for optimizers, driven over ours; run by ``make test-torch``."""
