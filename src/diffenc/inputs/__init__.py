"""What goes into a model: pictures, prompts, latents, noise."""
