"""What the benchmark programs share: jobs, contenders, clocks, counts and tables."""
