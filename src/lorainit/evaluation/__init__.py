"""Benchmarks for models that write: MT-Bench, AlpacaEval, GSM8K."""
