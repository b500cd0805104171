"""Matches activation boundaries (ABM-LoRA): finds the modules, takes a teacher's signs there, trains the adapter."""

from __future__ import annotations
