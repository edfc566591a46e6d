"""One call of a model: its inputs, the passes of the denoiser, both halves of its features."""
