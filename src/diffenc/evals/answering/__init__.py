"""What benchmarks of models that answer share: the model, its answers on disk, the paper's rows."""
