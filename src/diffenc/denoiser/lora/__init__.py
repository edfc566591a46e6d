"""Low-rank adapters (LoRA) on the cross-attention of a U-Net, injected and run by peft.

Adapters are named; several live in one U-Net. Under a half-precision U-Net their weights stay in
float32: in float16 they do not survive training.
"""

from diffenc.denoiser.lora.adapters import (
    active_lora,
    add_lora,
    is_merged,
    keep_precise,
    lora_disabled,
    lora_names,
    lora_parameters,
    merge_lora,
    plain_state,
    require_lora,
    set_lora,
    unmerge_lora,
)
from diffenc.denoiser.lora.files import fingerprint, load_lora, read_origin, save_lora
from diffenc.denoiser.lora.options import PROJECTIONS, LoraOptions

__all__ = [
    "PROJECTIONS",
    "LoraOptions",
    "active_lora",
    "add_lora",
    "fingerprint",
    "is_merged",
    "keep_precise",
    "load_lora",
    "lora_disabled",
    "lora_names",
    "lora_parameters",
    "merge_lora",
    "plain_state",
    "read_origin",
    "require_lora",
    "save_lora",
    "set_lora",
    "unmerge_lora",
]
