"""Checks of what is passed to public calls."""
