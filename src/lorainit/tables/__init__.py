"""Repeats published tables: carries out their rows as `lorainit train` does, and shows them beside what was printed."""
