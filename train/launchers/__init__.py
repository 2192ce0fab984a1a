"""Runs on other people's machines: files for their engines, and a supervisor for this one."""

from mixtral_jax.train.launchers.submit import submit
