"""Operators of a training step in C++, which torch knows by name."""
