"""Starts the adapters of a model: find, collect, solve, write, finish."""
