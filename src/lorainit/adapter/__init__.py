"""PEFT's live adapters: finds them, reads and writes their factors, and takes the changes back."""
