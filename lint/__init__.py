"""Checks of `make lint` that no tool of the field brings along."""
