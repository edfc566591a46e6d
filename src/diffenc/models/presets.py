"""Where published methods read, and at which noise level.

A preset gives the options of `EncoderConfig` that the released code of a method comes down to;
whatever the caller passes beside it wins. Sources stand with each. Where released code samples the
VAE's posterior, the preset does too, by seeded noise that all pictures share in place of the global
generator's.

Where a preset still differs from its release stands in "Taps and timesteps" of the documentation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError, TapError, near_matches

_GDF_SD = (
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
    "up_blocks.1.resnets.2",
    "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k",
)
_GDF_SDXL = (
    "up_blocks.0.attentions.0.transformer_blocks.7",
    "up_blocks.0.attentions.0.transformer_blocks.5",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    "up_blocks.1.attentions.0.transformer_blocks.0",
)

_HYPERFEATURES = {
    "taps": ("up_blocks.*.resnets.*.conv2",),
    "timestep": 50,
    "posterior": "sample",
}

_MUSTAFAR = ("up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Meng et al. 2024, arXiv:2410.03558: the "practical" sets, at timestep 50. SD 2.1 has no set of
    # its own there; it shares SD 1.5's topology and takes that one. No prompt is the empty text, on
    # SDXL too.
    "gdf": {
        "sd": {"taps": _GDF_SD, "timestep": 50, "posterior": "sample"},
        "sdxl": {"taps": _GDF_SDXL, "timestep": 50, "posterior": "sample", "uncond": "empty"},
    },
    # arXiv:2507.07106, later version, table 1: U-L1-R1-B0-Cross-Q of SD 2.1, the best of its six
    # layers and five timesteps. Whether the posterior is sampled is not stated: its mode is taken.
    "mustafar": {
        "sd": {"taps": _MUSTAFAR, "timestep": 50},
    },
    # Tang et al. 2023 (DIFT), arXiv:2306.03881: semantic correspondence; the second up block after
    # its upsampler, mean over 8 draws of posterior and noise.
    "dift": {
        "sd": {"taps": ("up_blocks.1",), "timestep": 261, "draws": 8, "posterior": "sample"},
    },
    # Stracke et al. 2024 (CleanDIFT), arXiv:2412.03439: clean latents under its own U-Net weights,
    # read at "us6". The timestep is what its learnt scalar starts from.
    "cleandift": {
        "sd": {"taps": ("up_blocks.1",), "timestep": 261, "noise": None, "posterior": "sample"},
    },
    # Gan et al. 2025 (DiTF), arXiv:2505.18584, released code: the input of block 28 of 57 behind
    # its adaptive norm, (1 + scale) LN(x) + shift, at sigma = 0.26, mean of x over 8 draws of
    # posterior and noise, 640 px, two massive channels of FLUX.1-dev's x discarded.
    "ditf": {
        "flux": {
            "taps": ("single_transformer_blocks.9.norm",),
            "timestep": 260,
            "draws": 8,
            "size": 640,
            "posterior": "sample",
            "discard": (154, 1446),
        },
    },
    # Luo et al. 2023 (Diffusion Hyperfeatures), arXiv:2305.14334: the branch of every decoder
    # resnet before it is added. Its multi-step inversion is not part of the preset.
    "hyperfeatures": {
        "sd": _HYPERFEATURES,
        "sdxl": _HYPERFEATURES,
    },
}
"""Options of `EncoderConfig` by name of the preset and by family."""

_NOTES = {
    "mustafar": (
        "the paper's later version reads SD 2.1 alone, and its draft reads SDXL at the taps of "
        "preset 'gdf'"
    ),
}


def preset_options(name: str, family: str) -> dict[str, Any]:
    """Options of `EncoderConfig` for a published method.

    Args:
        name: Name of the preset: "gdf", "mustafar", "dift", "cleandift", "hyperfeatures" or
            "ditf".
        family: Family of the backbone, such as "sd".

    Raises:
        ConfigError: No such preset, or not for this family.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {shown(name)}.{near_matches(name, PRESETS)} Known are "
            f"{sorted(PRESETS)}."
        )
    families = PRESETS[name]
    if family not in families:
        note = _NOTES.get(name, "pass taps and timestep instead")
        raise ConfigError(
            f"preset {name!r} is defined for {sorted(families)}, and this model is {family!r}; "
            f"{note}"
        )
    return dict(families[family])


@contextmanager
def naming_preset(name: str | None) -> Iterator[None]:
    """Say of taps that a model does not have that a preset, and nobody else, asked for them.

    Args:
        name: Name of the preset whose taps are matched; None if they are the caller's own.

    Raises:
        TapError: The model lacks one of them.
    """
    try:
        yield
    except TapError as error:
        if name is None:
            raise
        raise TapError(
            f"preset {name!r} reads taps that this model does not have: "
            f"{str(error).partition('. ')[0]}. The preset is for a model of another size: leave it "
            "out and pass taps and timestep of your own; diffenc.list_taps(model) gives the taps "
            "that there are"
        ) from error
