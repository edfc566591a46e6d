"""The process that the library runs in: threads, torch's defaults, inference mode."""
