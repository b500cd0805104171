"""Trains as a recipe says: model, adapter, start, Trainer, result."""
