"""Literal unions that appear in public signatures."""

from typing import Literal

Conditioning = Literal["uncond", "cond", "cfg", "concat"]
Resize = Literal["squash", "crop", "pad", "none"]
Uncond = Literal["zeros", "empty"]
Posterior = Literal["mode", "sample"]
Reused = Literal["down", "middle"]
LongPrompts = Literal["truncate", "chunk"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Placed = Literal["channel", "tokens", "interleave"]
Mixed = Literal["cross_attention", "add", "weighted", "gated", "token_gated", "question_gated"]
How = Literal[Placed, Mixed]
Tokens = Literal["grid", "words", "grid+words"]
Stream = Literal["clip", "diffusion"]
