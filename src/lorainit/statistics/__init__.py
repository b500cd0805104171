"""What is measured while batches run: sums per layer, collected in one pass for all that a method needs."""
