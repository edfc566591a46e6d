"""Vision tokens to the width of a language model: LLaVA's projectors, by LLaVA's names."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffenc.config import check_choice
from diffenc.errors import ConfigError, OutputError, ShapeError
from diffenc.maps import to_grid

_CONFIG_FILE, _WEIGHTS_FILE = "projector.json", "projector.safetensors"
_LLAVA_PREFIX = "model.mm_projector."
_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")


class Projector(nn.Module):
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

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write `projector.json` and `projector.safetensors`.

        Raises:
            OutputError: The folder cannot be written.
        """
        options = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "kind": self.kind,
            "norm_channels": list(self.norm_channels),
            "grid": None if self.grid is None else list(self.grid),
        }
        _write(Path(folder), options, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: "str | os.PathLike[str]") -> "Projector":
        """Inverse of `save_pretrained`.

        Raises:
            ConfigError: The folder does not hold a whole projector.
            ShapeError: Its weights do not fit its config.
        """
        source = Path(folder)
        options, state = _read(source)
        try:
            grid = options.pop("grid")
            projector = cls(**options, grid=None if grid is None else tuple(grid))
        except (ValueError, TypeError, KeyError) as error:
            raise _not_whole(source, error) from error
        _load(projector, state, str(source))
        return projector

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
        _load(self, state, str(path))


class FusedProjector(nn.Module):
    """One projector per stream, for tokens of which each belongs to CLIP or to the U-Net.

    `FusedEncoder` gives such tokens for "tokens" and "interleave"; their channels are those of both
    streams, and zero in the other's.

    Args:
        in_features: Channels of the first stream and of the second: `encoder.stream_channels`.
        out_features: Width of the language model.
        kind: Of both, see `Projector`.
        how: "tokens" where the first stream's tokens come first, "interleave" where the two take
            turns.
        first_tokens: How many tokens the first stream has, with "tokens"; not read otherwise.
        norm_channels: For each of the two, see `Projector`.

    Raises:
        ConfigError: As `Projector`; an unknown `how`, or "tokens" without their number.

    Example:
        >>> projector = projector_for(fused, 4096)
        >>> projector(fused(images, questions)).shape
        torch.Size([1, 832, 4096])

    Source:
        Tong et al. 2024, "Eyes Wide Shut?", arXiv:2401.06209: an adapter for each encoder.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        kind: str = "mlp2x_gelu",
        *,
        how: Literal["tokens", "interleave"],
        first_tokens: int | None = None,
        norm_channels: Sequence[Sequence[int]] = ((), ()),
    ) -> None:
        super().__init__()
        check_choice("how", how, ("tokens", "interleave"))
        if len(in_features) != 2 or len(norm_channels) != 2:
            raise ConfigError(
                f"a fused projector takes the widths of two streams, got {tuple(in_features)} with "
                f"norm_channels={tuple(norm_channels)}"
            )
        if how == "tokens" and (not isinstance(first_tokens, int) or first_tokens < 1):
            raise ConfigError(
                f"how='tokens' needs first_tokens, the number of the first stream's, got "
                f"{first_tokens!r}"
            )
        self.in_features, self.out_features = tuple(in_features), out_features
        self.kind, self.how, self.first_tokens = kind, how, first_tokens
        self.norm_channels = tuple(tuple(groups) for groups in norm_channels)
        self.streams = nn.ModuleList(
            Projector(width, out_features, kind, norm_channels=groups)
            for width, groups in zip(self.in_features, self.norm_channels, strict=True)
        )

    def forward(self, tokens: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n d"]:
        """Project each token by its stream's projector; their order stays.

        Raises:
            ShapeError: Another number of channels, or a number of tokens that is no such mixture.
        """
        left, right = self.in_features
        if tokens.shape[-1] != left + right:
            raise ShapeError(
                f"this projector takes tokens of {left} + {right} channels, got "
                f"{tokens.shape[-1]} (shape {tuple(tokens.shape)})"
            )
        count = tokens.shape[-2]
        if self.how == "interleave":
            if count % 2:
                raise ShapeError(f"interleaved tokens come in pairs, got {count}")
            pairs = [
                self.streams[0](tokens[..., 0::2, :left]),
                self.streams[1](tokens[..., 1::2, left:]),
            ]
            return torch.stack(pairs, dim=-2).flatten(-3, -2)
        assert self.first_tokens is not None
        if count <= self.first_tokens:
            raise ShapeError(
                f"of {count} tokens {self.first_tokens} would be the first stream's, which leaves "
                "none for the second"
            )
        first = self.streams[0](tokens[..., : self.first_tokens, :left])
        second = self.streams[1](tokens[..., self.first_tokens :, left:])
        return torch.cat([first, second], dim=-2)

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write `projector.json` and `projector.safetensors`.

        Raises:
            OutputError: The folder cannot be written.
        """
        options = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "kind": self.kind,
            "how": self.how,
            "first_tokens": self.first_tokens,
            "norm_channels": self.norm_channels,
        }
        _write(Path(folder), options, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: "str | os.PathLike[str]") -> "FusedProjector":
        """Inverse of `save_pretrained`.

        Raises:
            ConfigError: The folder does not hold a whole projector.
            ShapeError: Its weights do not fit its config.
        """
        source = Path(folder)
        options, state = _read(source)
        try:
            projector = cls(**options)
        except (ValueError, TypeError) as error:
            raise _not_whole(source, error) from error
        _load(projector, state, str(source))
        return projector


class TokenEncoder(Protocol):
    """What a projector is sized by: `DiffusionEncoder` and `FusedEncoder` are such."""

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token that come from each tap and half, in order."""


def projector_for(
    encoder: TokenEncoder, out_features: int, kind: str = "mlp2x_gelu", *, norm: bool | None = None
) -> Projector | FusedProjector:
    """The projector that fits an encoder.

    Args:
        encoder: A `DiffusionEncoder` or `FusedEncoder`.
        out_features: Width of the language model.
        kind: See `Projector`.
        norm: A layer norm for each tap (and half, and CLIP) before the first layer. None is one
            where there are several, which costs little where scales are alike and saves much where
            they are not (`diffenc study parts`). False is LLaVA's way, and that of its
            `mm_projector.bin`.

    Raises:
        ConfigError: See `Projector`.
    """
    how: Any = getattr(encoder, "how", "channel")
    if norm is None:
        norm = len(encoder.token_channels) > 1
    groups = encoder.token_channels if norm else ()
    if how == "channel":
        return Projector(encoder.hidden_size, out_features, kind, norm_channels=groups)
    fused: Any = encoder
    return FusedProjector(
        fused.stream_channels,
        out_features,
        kind,
        how=how,
        first_tokens=fused.clip_tokens if how == "tokens" else None,
        norm_channels=(groups[:1], groups[1:]),
    )


def _write(target: Path, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    weights = {key: value.detach().contiguous() for key, value in state.items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f"{_WEIGHTS_FILE}.partial"
        save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(target / _WEIGHTS_FILE)
        partial = target / f"{_CONFIG_FILE}.partial"
        partial.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        partial.replace(target / _CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        options = json.loads((source / _CONFIG_FILE).read_text(encoding="utf-8"))
        return dict(options), load_file(source / _WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise _not_whole(source, error) from error


def _not_whole(source: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source} does not hold what save_pretrained of this class wrote ({_CONFIG_FILE} and "
        f"{_WEIGHTS_FILE}): {error}"
    )


def _load(projector: Projector | FusedProjector, state: Mapping[str, Tensor], where: str) -> None:
    has = {key: tuple(value.shape) for key, value in state.items()}
    wants = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    if has != wants:
        raise ShapeError(
            f"{where} holds {_told(has)}; this projector ({projector.kind}, "
            f"{projector.in_features} -> {projector.out_features}) has {_told(wants)}"
        )
    projector.load_state_dict(dict(state))


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


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key.removeprefix('layers.')} {shape}" for key, shape in shapes.items())
