"""Common parts of benchmarks of models that answer: the model, saved answers, the paper's rows."""
