"""Implementations of the ops, one file a backend and op."""
