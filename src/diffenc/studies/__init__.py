"""Experiments over the whole library, each one function and one command."""
