"""How a model learns: configuration, objectives, optimizer, steps, hooks, runs."""

if __name__ != "mixtral_jax.train":  # under two names every class would exist twice
    raise ImportError("this folder is imported as mixtral_jax.train")
