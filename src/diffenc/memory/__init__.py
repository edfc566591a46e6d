"""What was computed once and is asked for again: caches, and keys that see every change of a model."""
