"""One projector for all tokens, which reads and writes LLaVA's own files."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.arguments import shown, sides, text, whole, wholes
from diffenc.denoiser.grids import to_grid
from diffenc.errors import ConfigError, ShapeError
from diffenc.projector.saved import SavedProjector, load_weights
from diffenc.runtime.inference import lasting
from diffenc.storage.tensors import read_pickled, read_tensors
from diffenc.storage.writing import writing

_WIDEST = 2**20
_LLAVA_PREFIX = "model.mm_projector."
_MLP = re.compile(r"mlp([1-9][0-9]?)x_gelu")


class Projector(SavedProjector):
    """Linear layers from vision tokens to language-model tokens.

    Args:
        in_features: Number of channels of a vision token: `encoder.hidden_size`.
        out_features: Width of the language model.
        kind: Kind of the layers: "linear", "identity", or "mlpNx_gelu", which is N linear layers
            with GELU between them.
        norm_channels: Widths of neighbouring groups of channels, each of which gets a layer norm of
            its own before the first layer: `encoder.token_channels` for one per tap. U-Net
            activations differ in scale from tap to tap by orders of magnitude. () is no norm,
            as LLaVA has it.
        grid: Side, or (height, width), of the grid to which the tokens are resampled first: by
            means where it is coarser, bilinearly where it is finer. The tokens must form a square.
            None keeps all tokens.
        device: Device on which the weights are made, in float32; "meta" makes none.

    Raises:
        ConfigError: An unknown kind, a width below 1, an identity between different widths, or
            groups that do not add up to `in_features`.

    Examples:
        >>> projector = Projector(1280, 4096)
        >>> projector(torch.zeros(1, 256, 1280)).shape
        torch.Size([1, 256, 4096])

    Source:
        Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5),
        arXiv:2310.03744: mlp2x_gelu with biases and without a norm.
    """

    options = ("in_features", "out_features", "kind", "norm_channels", "grid")

    @lasting
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str = "mlp2x_gelu",
        *,
        norm_channels: Sequence[int] = (),
        grid: int | tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        in_features = whole("in_features", in_features, least=1, most=_WIDEST)
        out_features = whole("out_features", out_features, least=1, most=_WIDEST)
        empty = isinstance(norm_channels, (tuple, list)) and not norm_channels
        norm_channels = () if empty else wholes("norm_channels", norm_channels)
        if norm_channels and (sum(norm_channels) != in_features or min(norm_channels) < 1):
            raise ConfigError(
                f"norm_channels must be widths that add up to in_features={in_features}, got "
                f"{tuple(norm_channels)}, in all {sum(norm_channels)}"
            )
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.norm_channels = norm_channels
        self.grid = None if grid is None else sides("grid", grid)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, dtype=torch.float32, device=device) for width in self.norm_channels
        )
        self.layers = _layers(in_features, out_features, kind, device)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"{self.in_features} -> {self.out_features}, {self.kind}, grid={self.grid}"

    def forward(self, tokens: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b m d"]:
        """Project tokens, in the dtype of the weights.

        Raises:
            ShapeError: Another number of channels, or a grid for tokens that form no square.
        """
        check_tokens(tokens)
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
        with writing(path) as partial:
            torch.save(state, partial)

    def load_llava(self, path: "str | os.PathLike[str]") -> None:
        """Read LLaVA's `mm_projector.bin`, or a safetensors file with such keys; weights only.

        Raises:
            ConfigError: The file cannot be read, or holds no projector or several.
            ShapeError: It holds a projector of another kind or width.
        """
        read = read_tensors if Path(path).suffix == ".safetensors" else read_pickled
        weights = read(path, finite=True)
        places = [key.rpartition("mm_projector.") for key in weights if "mm_projector." in key]
        if not places:
            some = sorted(weights)[:3]
            raise ConfigError(f"{path} holds no mm_projector; its first keys are {some}")
        prefixes = sorted({prefix + name for prefix, name, _ in places})
        if len(prefixes) > 1:
            raise ConfigError(
                f"{path} holds several projectors, {', '.join(prefixes)}; leave the keys of one"
            )
        state = {f"layers.{name}": weights[f"{prefixes[0]}{name}"] for _, _, name in places}
        load_weights(self, state, str(path))


def _layers(
    in_features: int, out_features: int, kind: str, device: str | torch.device
) -> nn.Module:
    kind = text("kind", kind)
    if kind == "linear":
        return _linear(in_features, out_features, device)
    if kind == "identity":
        if in_features != out_features:
            raise ConfigError(
                f"an identity keeps the width, but in_features is {in_features} and out_features "
                f"{out_features}; take 'linear' or 'mlp2x_gelu'"
            )
        return nn.Identity()
    if (match := _MLP.fullmatch(kind)) is None:
        raise ConfigError(
            f"kind must be 'linear', 'identity' or 'mlpNx_gelu' such as 'mlp2x_gelu', got "
            f"{shown(kind)}"
        )
    layers: list[nn.Module] = [_linear(in_features, out_features, device)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), _linear(out_features, out_features, device)]
    return nn.Sequential(*layers)


def _linear(in_features: int, out_features: int, device: str | torch.device) -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=torch.float32, device=device)


def check_tokens(tokens: object) -> None:
    """Raise a `ShapeError` unless this is a tensor of tokens."""
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not tokens.is_floating_point():
        raise ShapeError(
            "tokens must be a tensor of floats (batch, tokens, channels), got "
            f"{tuple(tokens.shape) if isinstance(tokens, Tensor) else shown(tokens)}"
        )


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
