"""Diffusion encoders in the place of CLIP: towers for other people's multimodal models.

`llava`, `transformers`, `prismatic` and `tinyllava` are for one host each; the rest is what they
share.
"""
