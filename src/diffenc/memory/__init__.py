"""Caches of results, and cache keys that change with everything a result depends on."""
