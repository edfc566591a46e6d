"""Pictures and captions matched by scores: Winoground, MMVP-VLM, and both in miniature."""
