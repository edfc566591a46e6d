"""What tells the weights behind a query bank from others."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.memory.cache import content_key
from diffenc.memory.digests import adapters_in_use
from diffenc.models.base import Backbone

_SAMPLES = 4096  # values of a tensor that count; training and merging change all of them


def weights_mark(backbone: Backbone, attentions: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that a search reads: key projections and text encoders.

    Returns:
        The "dtype" of the projections, a "digest" of all weights, and the "norms" of each layer's
        projection and then of each text encoder.
    """
    weights = [_in_use(attn.to_k).detach() for attn in attentions.values()]
    texts = [part for name, part in backbone.parts().items() if name.startswith("text")]
    keys = [content_key(weight.float()) for weight in weights]
    digests = [key.hex() for key in keys] + [_digest(part) for part in texts]
    norms = [float(weight.float().norm()) for weight in weights] + [_norm(part) for part in texts]
    return {
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "digest": hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest(),
        "norms": [round(norm, 6) for norm in norms],
    }


def same_weights(built: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two marks are of the same weights; in different dtypes, as far as norms tell."""
    if built["dtype"] == here["dtype"]:
        return bool(built["digest"] == here["digest"])
    one, other = (
        torch.tensor(mark["norms"], dtype=torch.float64, device="cpu") for mark in (built, here)
    )
    return len(one) == len(other) and torch.allclose(one, other, rtol=5e-3)


def model_mark(backbone: Backbone) -> dict[str, str]:
    """A digest of every part that queries depend on, adapters and noise schedule included."""
    marks = {name: _digest(part) for name, part in backbone.parts().items()}
    levels = backbone.noise_levels.detach().float()
    return {**marks, "schedule": content_key(levels).hex()}


def _in_use(projection: Any) -> Tensor:
    """A projection's weight with the adapters that run beside it."""
    weight: Tensor = projection.weight
    if not hasattr(projection, "lora_A") or projection.disable_adapters or projection.merged:
        return weight
    for name in projection.active_adapters:
        if name in projection.lora_A:
            weight = weight + projection.get_delta_weight(name).to(weight)
    return weight


def _digest(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(_sample(tensor).numpy().tobytes())
    digest.update(adapters_in_use(module).encode())
    return digest.hexdigest()


def _norm(module: nn.Module) -> float:
    squares = (float(_sample(part).double().square().sum()) for part in module.parameters())
    return math.sqrt(math.fsum(squares))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.float32).contiguous()
