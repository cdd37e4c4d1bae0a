"""The pocket lab: an invented world, a base model of a million parameters and an evaluation, all made on the spot."""
