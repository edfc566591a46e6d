"""Inputs of a model: pictures, prompts, latents, noise."""
