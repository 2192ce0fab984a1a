"""Learning from pairs of answers: the losses, their reference, and what a user says of them."""

from mixtral_jax.train.preference.losses import loss

__all__ = ["loss"]
