"""Text generation: a key/value cache, one jitted loop, sampling."""

from mixtral_jax.generation.cache import Cache, cache_slots, extend, inherit, prompt_states
from mixtral_jax.generation.engine import Prompts, check_options, generate, stream
