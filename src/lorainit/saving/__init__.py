"""Writes adapters to folders, checks and loads them; what servers make of them."""
