"""One projector for all tokens, which reads and writes LLaVA's own files."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from diffenc.errors import ConfigError, OutputError, ShapeError
from diffenc.maps import to_grid
from diffenc.projector.saved import SavedProjector, load_weights

_LLAVA_PREFIX = "model.mm_projector."
_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")


class Projector(SavedProjector):
    """Linear layers from vision tokens to language-model tokens.

    Args:
        in_features: Channels of a vision token: `encoder.hidden_size`.
        out_features: Width of the language model.
        kind: "linear", "identity", or "mlpNx_gelu": N linear layers with GELU between them.
        norm_channels: Widths of neighbouring groups of channels, each of which gets a layer norm of
            its own before the first layer: `encoder.token_channels` for one per tap. U-Net
            activations differ in scale from tap to tap by orders of magnitude. () is no norm,
            as LLaVA has it.
        grid: Side, or (height, width), of the grid to which the tokens are resampled first: means
            where it is coarser, bilinear where finer. The tokens must form a square. None keeps
            all.

    Raises:
        ConfigError: An unknown kind, a width below 1, an identity between different widths, or
            groups that do not add up to `in_features`.

    Example:
        >>> projector = Projector(1280, 4096)
        >>> projector(torch.zeros(1, 256, 1280)).shape
        torch.Size([1, 256, 4096])

    Source:
        Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5),
        arXiv:2310.03744: mlp2x_gelu with biases and without a norm.
    """

    options = ("in_features", "out_features", "kind", "norm_channels", "grid")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str = "mlp2x_gelu",
        *,
        norm_channels: Sequence[int] = (),
        grid: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ConfigError(f"{name} must be an int of 1 or more, got {width!r}")
        if norm_channels and (sum(norm_channels) != in_features or min(norm_channels) < 1):
            raise ConfigError(
                f"norm_channels must be widths that add up to in_features={in_features}, got "
                f"{tuple(norm_channels)}, in all {sum(norm_channels)}"
            )
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.norm_channels = tuple(norm_channels)
        pair = (grid, grid) if isinstance(grid, int) else grid
        if pair is not None and (len(pair) != 2 or min(pair) < 1):
            raise ConfigError(f"grid must be a positive int or (height, width), got {grid!r}")
        self.grid = None if pair is None else (pair[0], pair[1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.norm_channels)
        self.layers = _layers(in_features, out_features, kind)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"{self.in_features} -> {self.out_features}, {self.kind}, grid={self.grid}"

    def forward(self, tokens: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b m d"]:
        """Project tokens, in the dtype of the weights.

        Raises:
            ShapeError: Another number of channels, or a grid is asked of tokens that form no
                square.
        """
        if tokens.shape[-1] != self.in_features:
            raise ShapeError(
                f"this projector takes tokens of {self.in_features} channels, got "
                f"{tokens.shape[-1]} (shape {tuple(tokens.shape)}). Make it with "
                "in_features=encoder.hidden_size; conditioning='concat' doubles that."
            )
        weight = next(self.parameters(), None)
        if weight is not None:
            tokens = tokens.to(weight.dtype)
        if self.grid is not None:
            tokens = _resampled(tokens, self.grid)
        if len(self.norms):
            groups = tokens.split(self.norm_channels, dim=-1)
            tokens = torch.cat([norm(g) for norm, g in zip(self.norms, groups, strict=True)], -1)
        projected: Tensor = self.layers(tokens)
        return projected

    def save_llava(self, path: "str | os.PathLike[str]") -> None:
        """Write LLaVA's own `mm_projector.bin`, for hosts that read nothing else.

        Raises:
            ConfigError: Norms or a grid, for which that file has no place.
            OutputError: The file cannot be written.
        """
        if self.norm_channels or self.grid is not None:
            raise ConfigError(
                "LLaVA's mm_projector.bin has no place for norms or a grid; save this projector "
                "with save_pretrained"
            )
        state = {
            f"{_LLAVA_PREFIX}{key.removeprefix('layers.')}": value.detach().cpu().clone()
            for key, value in self.state_dict().items()
        }
        try:
            torch.save(state, path)
        except (OSError, RuntimeError) as error:
            raise OutputError(f"cannot write {path}: {error}") from error

    def load_llava(self, path: "str | os.PathLike[str]") -> None:
        """Read LLaVA's `mm_projector.bin`, or a safetensors file with such keys; weights only.

        Raises:
            ConfigError: The file cannot be read, or holds no projector.
            ShapeError: It holds a projector of another kind or width.
        """
        try:
            if Path(path).suffix == ".safetensors":
                found: Mapping[str, Any] = load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever a broken pickle makes it raise
            raise ConfigError(f"cannot read the projector {path}: {error}") from error
        state = {
            f"layers.{key.rpartition('mm_projector.')[2]}": value
            for key, value in found.items()
            if "mm_projector." in key
        }
        if not state:
            some = sorted(found)[:3]
            raise ConfigError(f"{path} holds no mm_projector; its first keys are {some}")
        load_weights(self, state, str(path))


def _layers(in_features: int, out_features: int, kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "identity":
        if in_features != out_features:
            raise ConfigError(
                f"an identity keeps the width, but in_features is {in_features} and out_features "
                f"{out_features}; take 'linear' or 'mlp2x_gelu'"
            )
        return nn.Identity()
    if (match := _MLP.fullmatch(kind)) is None:
        raise ConfigError(
            f"kind must be 'linear', 'identity' or 'mlpNx_gelu' such as 'mlp2x_gelu', got {kind!r}"
        )
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)


def _resampled(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    side = math.isqrt(tokens.shape[-2])
    if side * side != tokens.shape[-2]:
        raise ShapeError(
            f"{tokens.shape[-2]} tokens form no square, so they cannot be resampled to {grid}; "
            "resample the maps: features.tokens(grid=...)"
        )
    leading = tokens.shape[:-2]
    rows = tokens.flatten(0, -3) if leading else tokens[None]
    maps = rearrange(rows, "b (h w) c -> b c h w", h=side)
    resampled = rearrange(to_grid(maps, grid), "b c h w -> b (h w) c")
    return resampled.reshape(*leading, *resampled.shape[1:])
