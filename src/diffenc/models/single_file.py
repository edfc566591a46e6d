"""One `.safetensors` file in the original layout of Stable Diffusion, taken apart without network.

What such a file does not hold stands in diffenc's bundled configs; the tokenizer comes from the
Hub's cache or from the caller. diffusers' own conversion renames the weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

from diffenc.errors import BackboneError, ConfigError
from diffenc.models.building import build_part
from diffenc.models.configs import Architecture
from diffenc.models.statements import Statements
from diffenc.models.variants import INPUTS
from diffenc.models.weights import LDM_UNET, State, convert_unet, load_denoiser, load_into

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT_ENCODERS = {
    "sd1.5": {"text_encoder": "cond_stage_model.transformer."},
    "sd2.1": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_VARIANTS = {  # by the width of the texts, and whether there is something beside them
    (1280, True): "the refiner of SDXL, which finishes pictures of the base model",
    (1024, True): "a model that reads embeddings of pictures (unCLIP)",
}
_TRANSFORMERS = {  # by a part of names, the more particular one first
    "joint_blocks.": ("Stable Diffusion 3", "diffusers.SD3Transformer2DModel.from_single_file"),
    "double_blocks.": ("FLUX", "diffusers.FluxTransformer2DModel.from_single_file"),
    "attention_y_norm": ("Sana", "diffusers.SanaTransformer2DModel.from_single_file"),
    "cross_attn.q_linear": ("PixArt", None),
}
"""What a transformer is, and what of diffusers reads its file, by names in the original layout."""


class SingleFile:
    """An open checkpoint; parts are read when they are asked for.

    Args:
        path: A `.safetensors` file.

    Raises:
        BackboneError: It is broken, or holds no U-Net in the original layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as opened:
                self.names = frozenset(opened.keys())
                self.metadata: dict[str, str] = opened.metadata() or {}
        except Exception as error:  # SafetensorError is no subclass of a builtin
            raise BackboneError(f"cannot load {path}: {error}") from error
        if f"{_UNET}{LDM_UNET}" not in self.names:
            for part, (kind, reader) in _TRANSFORMERS.items():
                if self._any(part):
                    raise BackboneError(_transformer_file(path, kind, reader))
            if any(name.startswith("transformer_blocks.") for name in self.names):
                raise BackboneError(_transformer_file(path, "diffusers'", None))
            raise BackboneError(
                f"{path} is no checkpoint of a whole Stable Diffusion: it lacks "
                f"{_UNET + LDM_UNET!r}. Its first names are {sorted(self.names)[:3]}. Weights of a "
                "U-Net alone are passed as unet=, beside the name of the model that they belong to."
            )
        self.statements = Statements.read(self.names, self.metadata, str(path))

    @property
    def kind(self) -> str:
        """Kind of model whose text encoders the file has room for: "sd1.5", "sd2.1" or "sdxl".

        Raises:
            BackboneError: Another architecture, or one that diffenc does not read.
        """
        label = f"{_UNET}label_emb.0.0.weight" in self.names
        widths = {
            self.shape(name)[1]
            for name in self.names
            if name.startswith(_UNET) and name.endswith("attn2.to_k.weight")
        }
        kinds = {(768, False): "sd1.5", (1024, False): "sd2.1", (2048, True): "sdxl"}
        channels = self.shape(_UNET + LDM_UNET)[1]
        width = min(widths, default=0)
        kind = kinds.get((width, label))
        if kind is None or len(widths) > 1 or channels != 4:
            what = INPUTS.get(channels) or _VARIANTS.get((width, label))
            raise BackboneError(
                f"{self.path} is no Stable Diffusion 1.x, 2.x or XL base"
                f"{f' but {what}' if what else ''}: its U-Net takes "
                f"{channels} channels and texts of width {sorted(widths)}. For a variant pass "
                "architecture= with a diffusers folder that holds its configs."
            )
        return kind

    def _any(self, part: str) -> bool:
        return any(part in name for name in self.names)

    def shape(self, name: str) -> list[int]:
        """Shape of a weight, which is not read for it."""
        with safe_open(self.path, framework="pt") as opened:
            shape: list[int] = opened.get_slice(name).get_shape()
            return shape

    def state(self, prefix: str) -> State:
        """The weights whose names begin so, by their whole names."""
        with safe_open(self.path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in self.names if name.startswith(prefix)}

    def known_alias(self, prediction_type: str | None = None) -> str:
        """The alias whose configs describe this file.

        Args:
            prediction_type: Prediction type that the caller states for the U-Net; it wins over the
                file and the architecture. None reads the file's.

        Raises:
            ConfigError: Its weights could be of a model that predicts noise or of one that
                predicts v, and neither its metadata nor the caller says which; or it calls itself
                another model than its shapes show.
            BackboneError: See `kind`.
        """
        kind = self.kind
        self.statements.check_kind(kind)
        if kind != "sd2.1":
            return kind
        predicts = prediction_type or self.statements.prediction()
        if predicts is None:
            raise ConfigError(
                f"{self.path} is a Stable Diffusion 2, and does not say whether it predicts noise "
                "(512 px) or v (768 px); pass architecture='sd2.1-base' or 'sd2.1'"
            )
        return "sd2.1" if predicts == "v_prediction" else "sd2.1-base"

    def described(
        self, architecture: Architecture, *, prediction_type: str | None, chosen: bool
    ) -> Architecture:
        """The configs that the file is read by, with what it says of itself.

        Args:
            architecture: Architecture of a known model, or of a folder.
            prediction_type: Prediction type that the caller states for the U-Net; it wins over the
                file and the architecture. None reads the file's.
            chosen: Whether the caller chose the architecture.

        Raises:
            ConfigError: The file contradicts itself, or an architecture that was chosen.
        """
        configs = dict(architecture.configs)
        configs["scheduler"] = self.statements.scheduler(
            configs["scheduler"], prediction_type=prediction_type, chosen=chosen
        )
        if not chosen:
            configs["text_encoder"] = self.statements.text_encoder(
                configs["text_encoder"], self.kind
            )
        return replace(architecture, configs=configs)

    def part(
        self,
        name: str,
        described: Architecture,
        *,
        dtype: torch.dtype,
        keep_taps: Sequence[str] | None = None,
    ) -> Any:
        """The U-Net, the VAE or a text encoder, converted.

        Args:
            name: Name of the part: "unet", "vae", "text_encoder" or "text_encoder_2".
            described: Configs that the file is read by.
            dtype: Floating point type of the weights.
            keep_taps: Module paths of the U-Net; what lies behind the last of them is left out.
                None keeps all.

        Raises:
            BackboneError: The file lacks it, or its weights do not fit the configs.
        """
        config, what = described.configs[name], f"{name} of {self.path}"
        if name == "unet":
            inner = {key.removeprefix(_UNET): value for key, value in self.state(_UNET).items()}
            state = convert_unet(inner, config)
            self._check_converted(inner, state)
            return load_denoiser(config, state, what=what, dtype=dtype, keep_taps=keep_taps)
        if name == "vae":
            return self._vae(config, what, dtype)
        return self._text_encoder(name, config, what, dtype)

    def _check_converted(self, inner: State, converted: State) -> None:
        """Refuse weights that the conversion passes over: they are of layers beside the usual."""
        known = {id(value) for value in converted.values()}
        left = [key for key, value in inner.items() if id(value) not in known and value.numel()]
        if left:
            raise BackboneError(
                f"the U-Net of {self.path} has {len(left)} weights more than a Stable Diffusion, "
                f"such as {min(left)!r}; diffenc reads the plain model"
            )

    def _vae(self, config: dict[str, Any], what: str, dtype: torch.dtype) -> Any:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        state = self.state(_VAE)
        if not state:
            raise BackboneError(self._lacks("a VAE", _VAE, "vae"))
        converted = convert_ldm_vae_checkpoint(state, config)
        return load_into(lambda: build_part("vae", config), converted, what=what, dtype=dtype)

    def _text_encoder(
        self, name: str, config: dict[str, Any], what: str, dtype: torch.dtype
    ) -> Any:
        prefixes = [
            layout[name]
            for layout in _TEXT_ENCODERS.values()
            if name in layout and any(key.startswith(layout[name]) for key in self.names)
        ]
        if not prefixes:
            expected = " or ".join(
                repr(layout[name]) for layout in _TEXT_ENCODERS.values() if name in layout
            )
            raise BackboneError(self._lacks("a text encoder", expected, name))
        state = _rename_text(self.state(prefixes[0]), prefixes[0], config)
        with torch.device("meta"):
            names = build_part(name, config).state_dict().keys()
        return load_into(
            lambda: build_part(name, config), _fit_names(state, names), what=what, dtype=dtype
        )

    def _lacks(self, part: str, prefix: str, argument: str) -> str:
        return (
            f"{self.path} holds no {part.removeprefix('a ')}: no name begins with {prefix}. Pass "
            f"{argument}= with a folder or a model; that of the model it was made from is one."
        )


def _rename_text(state: State, prefix: str, config: dict[str, Any]) -> State:
    """A text encoder under transformers' names."""
    from diffusers.loaders import single_file_utils

    if prefix.endswith("transformer."):
        return {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if not key.endswith("position_ids")
        }
    stand_in = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted: State = single_file_utils.convert_open_clip_checkpoint(
        stand_in, state, prefix=prefix
    )
    return converted


def _fit_names(state: State, expected: Any) -> State:
    """Names as this version of transformers has them, and no layers behind those that are read.

    `CLIPTextModel` lost the prefix "text_model." in transformers 5.6; Stable Diffusion 2 reads one
    layer less than its files hold, and no projection.
    """
    if not any(name.startswith("text_model.") for name in expected):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    layers = {".".join(name.split(".")[:-2]) for name in expected if ".layers." in name}
    deepest = max((int(_layer(name)) for name in layers), default=-1)
    return {
        key: value
        for key, value in state.items()
        if (int(_layer(key)) <= deepest if ".layers." in key else key in expected)
    }


def _layer(name: str) -> str:
    return name.partition(".layers.")[2].partition(".")[0]


def _transformer_file(path: Path, kind: str, reader: str | None) -> str:
    """Message for a file of a diffusion transformer."""
    instead = f", transformer={reader}(path)" if reader else ""
    return (
        f"{path} is no checkpoint of a whole Stable Diffusion: it is {kind}, a transformer, whose "
        "single files are not read. Pass the diffusers folder or the Hub id of the model"
        + (f"; other weights of the transformer beside it{instead}" if instead else "")
        + ", or transformer= with a folder that holds config.json beside the file."
    )
