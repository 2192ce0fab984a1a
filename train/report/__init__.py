"""A run's own page: one HTML file of everything that its files say. Nothing here imports jax."""

from mixtral_jax.train.report.command import promise_page, report, write_page
