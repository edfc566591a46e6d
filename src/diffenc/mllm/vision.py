"""Vision models of transformers as baselines, and how many tokens an encoder gives a picture."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from diffenc.checks.arguments import flag
from diffenc.checks.fields import require_finite
from diffenc.clip.tokens import ClipTokens
from diffenc.clip.vision_models import VisionModel, process, to_pictures
from diffenc.denoiser.grids import middle_grid
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, ShapeError
from diffenc.fusion import FusedEncoder
from diffenc.inputs.images import Images
from diffenc.passes.question_tokens import token_count
from diffenc.runtime.inference import lasting
from diffenc.runtime.threads import lock_of
from diffenc.storage.pretrained import (
    lasting_name,
    load_image_processor,
    load_whole,
    loading,
    model_kind,
)

_INSTEAD = "Pass a folder or a Hub id such as openai/clip-vit-large-patch14-336"
_TWO_STREAMS = ("tokens", "interleave")
"""Ways of joining in which a token belongs to one of the two encoders."""
_CLIP_LIKE = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


class VisionTokens(VisionModel):
    """Patch tokens of any vision model of transformers that reads no text; prompts have no effect.

    CLIP and SigLIP run through `ClipTokens`; DINOv2 and other vision transformers give the tokens
    of their patches, without those that stand before them (class, registers).

    Args:
        model: A model whose output has `hidden_states`.
        image_processor: Image processor of the model.
        layer: Index of the hidden state that is read; -2 is LLaVA's for CLIP.
        name: Name or path that the model was loaded from; None for an object.
        pad: Whether pictures are first padded to squares with the mean colour of the image
            processor, as LLaVA-1.5's second stage does; otherwise the image processor alone makes
            them square, which cuts off what lies outside.

    Raises:
        ConfigError: Patches or pictures are not square, or there is no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: Any,
        *,
        layer: int = -2,
        name: str | None = None,
        pad: bool = False,
    ) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", type(model).__name__)
        self.image_processor, self.layer, self.name = image_processor, layer, name
        self.pad = flag("pad", pad)
        self.model = model
        if kind in _CLIP_LIKE:
            self.model = ClipTokens(model, image_processor, layer=layer, name=name)
            self.hidden_size = self.model.hidden_size
            self.side = self.model.side
            return
        patch = getattr(config, "patch_size", None)
        width, depth = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", 0)
        if not isinstance(patch, int) or not isinstance(width, int):
            raise ConfigError(
                f"{kind!r} has no square patches (patch_size={patch!r}, hidden_size={width!r}); "
                "baselines are vision transformers such as CLIP, SigLIP and DINOv2"
            )
        if not -depth - 1 <= layer <= depth:
            raise ConfigError(f"layer must be {-depth - 1} to {depth}, got {layer}")
        self.hidden_size = width
        self.patch = patch
        self.side = processed_side(image_processor) // patch
        self.model.eval().requires_grad_(False)

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str]",
        *,
        image_processor: Any = None,
        layer: int = -2,
        pad: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "VisionTokens":
        """Load a vision model and its image processor.

        Args:
            name: Name of the model: a folder or a Hub id, such as ``"facebook/dinov2-large"``;
                "shapes-clip" is the bundled miniature.
            image_processor: Replacement for the model's own image processor; None loads that.
            layer: Index of the hidden state that is read; see the class for this and the next.
            pad: Whether pictures are first padded to squares.
            device: Device of the model.
            dtype: Floating point type of the weights.

        Raises:
            BackboneError: There is no such model.
        """
        import transformers

        label = os.fspath(name)
        with loading("a vision model", label, instead=_INSTEAD):
            if model_kind(name) in _CLIP_LIKE:
                tokens = ClipTokens.from_pretrained(
                    name, image_processor=image_processor, layer=layer, device=device, dtype=dtype
                )
                return cls(
                    tokens.model,
                    tokens.image_processor,
                    layer=layer,
                    name=lasting_name(name),
                    pad=pad,
                )
            # The states of its layers are read, and never what a pooler makes of them.
            model = load_whole(
                transformers.AutoModel, name, dtype=dtype, unread=("pooler.", "head.")
            )
            if image_processor is None:
                image_processor = load_image_processor(name)
        return cls(model.to(device), image_processor, layer=layer, name=lasting_name(name), pad=pad)

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token."""
        return (self.hidden_size,)

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture."""
        return self.side**2

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "VisionTokens":
        """Training mode; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self, images: Images, prompts: str | Sequence[str] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Tokens of pictures, row by row.

        Args:
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`.
            prompts: Prompts, which are ignored.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Another number of tokens than the pictures have patches.
            NonFiniteError: NaN or infinity in the tokens.
        """
        sources: Images = images
        if self.pad:
            mean = getattr(self.image_processor, "image_mean", None)
            sources = [padded(picture, mean) for picture in to_pictures(images)]
        if isinstance(self.model, ClipTokens):
            hidden: Tensor = self.model(sources)
            return hidden
        pixel_values = process(self.image_processor, to_pictures(sources))["pixel_values"]
        if {side // self.patch for side in pixel_values.shape[-2:]} != {self.side}:
            raise ShapeError(
                f"the image processor gives {tuple(pixel_values.shape[-2:])} pixels, and says that "
                f"it makes {self.side} x {self.side} patches of {self.patch}; pass one that "
                "resizes or crops all pictures to its size"
            )
        inputs = pixel_values.to(self.device, self.dtype)
        with lock_of(self.model), torch.no_grad():
            states = self.model(inputs, output_hidden_states=True).hidden_states[self.layer]
        expected = self.side**2
        if states.ndim != 3 or states.shape[1] < expected:
            raise ShapeError(
                f"{self.name or type(self.model).__name__} gives {tuple(states.shape)} for "
                f"{self.side} x {self.side} patches; its tokens cannot be told apart"
            )
        require_finite(states, f"states of layer {self.layer}", "try float32 or bfloat16")
        tokens: Tensor = states[:, -expected:]
        return tokens


def padded(picture: Image.Image, mean: Sequence[float] | None) -> Image.Image:
    """A picture in the middle of a square of one colour, as LLaVA's `expand2square` makes it.

    Args:
        picture: Picture, RGB.
        mean: Colour of the margins, 0 to 1 for each channel; None is grey.

    Source:
        Liu et al. 2023, arXiv:2310.03744: `image_aspect_ratio pad` of the released code.
    """
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    red, green, blue = (int(255 * level) for level in (mean or (0.5, 0.5, 0.5)))
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def tokens_per_image(encoder: nn.Module) -> int | None:
    """How many tokens an encoder gives a picture, before it sees one; None where that varies.

    Args:
        encoder: A `DiffusionEncoder`, `FusedEncoder` or `VisionTokens`.
    """
    if isinstance(encoder, DiffusionEncoder):
        return _diffusion_tokens(encoder)
    if not isinstance(encoder, FusedEncoder):
        count: int | None = getattr(encoder, "num_tokens", None)
        return count
    if _clip_asks(encoder):
        return encoder.clip_tokens
    of_diffusion = _diffusion_tokens(encoder.diffusion, encoder.grid)
    if encoder.how not in _TWO_STREAMS or of_diffusion is None:
        return of_diffusion
    return encoder.clip_tokens + of_diffusion


def token_grid(encoder: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the grid that an encoder's tokens form, row by row.

    Args:
        encoder: A `DiffusionEncoder`, `FusedEncoder` or `VisionTokens`.

    Returns:
        None where they form none, as those of words or of two encoders in one row, or where it
        varies with the pictures' sizes.
    """
    if isinstance(encoder, VisionTokens):
        return encoder.side, encoder.side
    if isinstance(encoder, FusedEncoder):
        if encoder.how in _TWO_STREAMS:
            return None
        if _clip_asks(encoder):
            return encoder.grid or encoder.clip.grid
        diffusion, grid = encoder.diffusion, encoder.grid
    elif isinstance(encoder, DiffusionEncoder):
        diffusion, grid = encoder, None
    else:
        return None
    return _cells(diffusion, grid) if diffusion.config.tokens == "grid" else None


def check_square(encoder: nn.Module) -> None:
    """Raise unless a projector may resample the tokens of an encoder as a square of cells.

    Their number does not tell: 16 words, or 4 x 16 cells, would pass for 4 x 4 or 8 x 8 cells.

    Raises:
        ConfigError: The tokens form no square, or it is not known that they do.
    """
    grid = token_grid(encoder)
    if grid is None and not isinstance(encoder, (DiffusionEncoder, FusedEncoder)):
        return  # somebody else's: its number of tokens has to do
    if grid is None or grid[0] != grid[1]:
        form = "no grid of one size" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
        raise ConfigError(
            f"a projector with a grid resamples squares of cells, and this encoder's tokens form "
            f"{form}; set the encoder's own grid= and leave out the projector's"
        )


def _clip_asks(encoder: FusedEncoder) -> bool:
    """Whether CLIP's tokens attend to the others, and so are as many as before."""
    mixer = encoder.mixer if encoder.how == "cross_attention" else None
    return mixer is not None and mixer.config.asks == "clip"


def _diffusion_tokens(encoder: DiffusionEncoder, grid: tuple[int, int] | None = None) -> int | None:
    cells = _cells(encoder, grid)
    if cells is None:
        return token_count(encoder.config, 0) if encoder.config.tokens == "words" else None
    return token_count(encoder.config, cells[0] * cells[1])


def _cells(encoder: DiffusionEncoder, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of the grid of cells; None where pictures keep their sizes."""
    config, backbone = encoder.config, encoder.backbone
    own = grid or config.grid
    if own is not None:
        return (own, own) if isinstance(own, int) else own
    if config.resize == "none":
        return None
    size = config.size or backbone.default_size
    return middle_cells(size, backbone.reduction, [tap.reduction for tap in encoder.feature_info])


def middle_cells(
    size: int | tuple[int, int], vae: int, reductions: Sequence[int]
) -> tuple[int, int]:
    """(height, width) of the middle one of several taps' grids.

    Args:
        size: Side of the square pictures, or (height, width), in pixels.
        vae: Image pixels per side of a latent cell.
        reductions: Image pixels per side of a cell, for each tap.
    """
    sides = (size, size) if isinstance(size, int) else size
    multiple = [-(-side // vae) for side in sides]
    grids = []
    for reduction in reductions:
        height, width = multiple
        for _ in range((reduction // vae).bit_length() - 1):
            height, width = (height + 1) // 2, (width + 1) // 2  # strided convolutions round up
        grids.append((height, width))
    return middle_grid(grids)


def processed_side(image_processor: Any) -> int:
    """Side of the square that an image processor makes."""
    size = getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", size is not None) or not size:
        size = getattr(image_processor, "size", None)
    values = dict(size) if size is not None and not isinstance(size, int) else {"height": size}
    sides = {value for value in values.values() if value is not None}
    if len(sides) != 1 or "shortest_edge" in values:
        raise ConfigError(
            f"the image processor makes no squares of a known size (it says {values}); pass one "
            "with crop_size or with size of equal height and width"
        )
    return int(sides.pop())
