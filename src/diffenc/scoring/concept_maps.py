"""Where in an image concepts are seen that no prompt needs to hold."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.fields import require_finite
from diffenc.denoiser.concept_attention import ConceptTaps
from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.models.base import Backbone


def concept_maps(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    text: str,
    concepts: Sequence[str],
    *,
    timesteps: Sequence[int],
    layers: str | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "images concepts gh gw"]:
    """Where each of some concepts is seen, as ConceptAttention's released code has it.

    Concepts run beside the pass under the text, which they leave as it is. At each layer, the
    attention outputs of a cell and of the concepts are multiplied, and softmax over the concepts
    shares the cell out; the maps are the mean over layers and timesteps.

    Args:
        backbone: The text-to-image model, in which picture and text are joined.
        latents: Latents of the images, without noise.
        text: Prompt that the pictures are read under.
        concepts: Two concepts or more, which need not stand in the text. Of each, one token is
            read, the first.
        timesteps: Noise levels, as scheduler steps.
        layers: Module paths of joint attentions, or of blocks around them; None takes all whose
            text has weights of its own.
        heads: None: outputs of all heads are multiplied.
        seed: Seed of the noise.

    Returns:
        Shares in [0, 1] that sum to 1 over the concepts, in float32.

    Raises:
        PromptError: Fewer than two concepts, or one that is blank.
        ConfigError: Heads, no timestep, or one outside the schedule; a model without such concepts.
        TapError: No such layer.

    Source:
        Helbling et al. 2025 (ConceptAttention), arXiv:2502.04320, section 4, and its released code.
    """
    if len(concepts) < 2 or not all(concept.strip() for concept in concepts):
        raise PromptError(
            f"concepts share each cell out among themselves, so that it takes two or more, none of "
            f"them blank, got {list(concepts)}; add what else is in the picture, such as "
            "'background'"
        )
    if heads is not None:
        raise ConfigError("concept maps multiply the outputs of all heads; leave heads out")
    if not timesteps:
        raise ConfigError("timesteps must hold one scheduler step or more, got none")
    c, h, w = latents.shape[1:]
    size = (h * backbone.reduction, w * backbone.reduction)
    shares: list[Tensor] = []
    with backbone.lock, torch.no_grad():
        embeds = backbone.embed([text], size=size)
        stream = backbone.concepts(concepts, size=size)
        for timestep in timesteps:
            noise = shared_noise((c, h, w), seed=seed, timestep=timestep)
            noisy = add_noise(backbone.scheduler, latents, noise, timestep)
            with ConceptTaps(backbone.denoiser, layers, stream) as reader:
                products = reader.run(partial(backbone.denoise, noisy, timestep, embeds))
            for name, of_layer in products.items():
                require_finite(
                    of_layer,
                    f"concept maps of {name!r} with a {backbone.denoiser_word} in {backbone.dtype}",
                    "load the model with dtype=torch.bfloat16 or torch.float32",
                )
            shares += [of_layer.softmax(dim=1) for of_layer in products.values()]
    return torch.stack(shares).mean(dim=0)
