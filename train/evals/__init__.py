"""Benchmarks in process."""
