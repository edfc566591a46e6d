"""CLIP and its kin: loaded, as tokens, as one embedding, as the captioner's ear."""
