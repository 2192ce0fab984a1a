"""Learning from pairs of answers: the losses, their reference, and what a user says of them."""

from mixtral_jax.train.preference.config import DpoConfig, Reference
from mixtral_jax.train.preference.losses import loss
from mixtral_jax.train.preference.objective import PairSums, make_sequence_logps, preference
from mixtral_jax.train.preference.references import Put, live, precomputed
