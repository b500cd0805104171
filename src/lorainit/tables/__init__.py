"""Tables of published experiments: their rows carried out through `lorainit train`, beside what was printed."""
