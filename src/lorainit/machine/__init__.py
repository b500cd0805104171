"""Processes, sharding, memory, precision, cost, locks and provenance: what runs it, not what is run."""
