"""Results that are kept: caches, and keys that change with everything a result depends on."""
