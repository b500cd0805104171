"""Activation boundaries: which modules feed an activation, what a teacher's signs there are, how to match them."""

from __future__ import annotations
