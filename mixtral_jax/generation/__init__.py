"""Text generation: a key/value cache, one jitted loop, sampling."""

from mixtral_jax.generation.engine import Prompts, generate, stream
