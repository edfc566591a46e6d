"""Which library a baseline of pictures and texts is loaded by."""

import os

import torch

from diffenc.evals.matching.base import Matcher
from diffenc.evals.matching.clip import ClipMatcher
from diffenc.evals.matching.open_clip_models import CONFIG, OpenClipMatcher
from diffenc.evals.matching.siglip import SIGLIP, SiglipMatcher
from diffenc.storage.hub import hub_folder
from diffenc.storage.names import expanded, is_file, is_folder
from diffenc.storage.pretrained import model_kind


def load_baseline(
    name: "str | os.PathLike[str]",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Matcher:
    """Load a CLIP or SigLIP of transformers, or a model of open_clip.

    A folder or a repository with both is read by transformers.

    Args:
        name: Path of a folder, a Hub id, or "shapes-clip".
        device: Device that the model runs on.
        dtype: Floating point type of the weights.

    Raises:
        BackboneError: There is no such model.
        MissingExtraError: A library is not installed.
    """
    label = os.fspath(name)
    kind = _kind(label)
    if kind in SIGLIP:
        return SiglipMatcher.from_pretrained(label, device=device, dtype=dtype)
    if kind != "clip" and _is_open_clip(label):
        return OpenClipMatcher.from_pretrained(label, device=device, dtype=dtype)
    return ClipMatcher.from_pretrained(label, device=device, dtype=dtype)


def _kind(name: str) -> str | None:
    """Kind of a model of transformers; None where there is none, or it cannot be read."""
    try:
        return model_kind(name)
    except Exception:  # who loads it says why
        return None


def _is_open_clip(name: str) -> bool:
    """Whether a folder, or a repository of the Hub, says that it is a model of open_clip."""
    path = expanded(name)
    try:
        folder = path if is_folder(path) else hub_folder(name, lambda file: file == CONFIG)
    except Exception:  # no such repository
        return False
    return is_file(folder / CONFIG)
