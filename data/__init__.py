"""Numpy in, numpy out: records, tokens, packed rows, one global order. No jax in here."""

if __name__ != "mixtral_jax.data":  # under two names every class would exist twice
    raise ImportError("this folder is imported as mixtral_jax.data")
