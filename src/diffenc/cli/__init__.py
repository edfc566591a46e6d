"""The command line: `diffenc demo`, `diffenc encode`, `diffenc info`."""
