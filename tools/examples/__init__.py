"""Whole programs that a user may start from, each in one file."""
