"""Lets PyPI's torchvision, which a CPU build of torch cannot load whole, be imported by forks.

Imported before whatever imports torchvision.
"""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor x, Tensor y, float z) -> Tensor")
