"""What a file of weights says of its model, in marker tensors and in metadata.

Empty tensors called `v_pred` and `ztsnr` mark models that predict v, and models whose last step is
noise alone. Metadata follow Stability's ModelSpec (`modelspec.*`) or kohya's training scripts
(`ss_*`). What is said is honoured, or refused; nothing of it is passed over.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffenc.errors import BackboneError, ConfigError

_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
}
_EDM = {
    "edm_mean": "Playground 2.5",
    "edm_std": "Playground 2.5",
    "edm_vpred.sigma_max": "CosXL",
    "edm_vpred.sigma_min": "CosXL",
}
_KINDS = (  # beginnings of `modelspec.architecture` and of `ss_base_model_version`
    ("stable-diffusion-v1", "sd1.5"),
    ("stable-diffusion-v2", "sd2.1"),
    ("stable-diffusion-xl", "sdxl"),
    ("sd_v1", "sd1.5"),
    ("sd_v2", "sd2.1"),
    ("sdxl", "sdxl"),
)
_VARIANTS = ("refiner", "inpaint", "depth", "unclip", "upscale", "pix2pix", "edit")

MARKERS = ("v_pred", "ztsnr")
"""Names of empty tensors that mark the kind of a model and are no weights."""

Claim = tuple[str, Any]
"""Place of a statement in the file, and its value."""


@dataclass(frozen=True, slots=True)
class Statements:
    """What a file says of its model.

    Attributes:
        where: Name of the file, for messages.
        predictions: Claims about the U-Net's prediction: "epsilon", "v_prediction", "sample", or
            another word.
        zero_snr: Claims about whether the last step is noise alone.
        kinds: Claims about the kind of the model: "sd1.5", "sd2.1" or "sdxl", or the word for
            another model.
        encoder_layers: Claims about the layer of the text encoder that the U-Net reads, 1 being the
            last.
    """

    where: str
    predictions: tuple[Claim, ...] = ()
    zero_snr: tuple[Claim, ...] = ()
    kinds: tuple[Claim, ...] = ()
    encoder_layers: tuple[Claim, ...] = ()

    @classmethod
    def read(cls, names: Collection[str], metadata: Mapping[str, str], where: str) -> "Statements":
        """Read the names of the tensors in a file, and its metadata.

        Raises:
            BackboneError: A model whose noise is no schedule of steps (EDM).
        """
        ends = {name.rpartition(".")[2] for name in names}
        if edm := sorted(_EDM.keys() & ({*names} | ends)):
            raise BackboneError(
                f"{where} is a model like {_EDM[edm[0]]}: it holds {edm[0]!r}, so its noise levels "
                "are continuous (EDM); diffenc reads models that count steps of noise"
            )
        markers = {name for name in MARKERS if name in ends}
        plain = {key.lower(): str(value).strip() for key, value in metadata.items()}
        return cls(
            where,
            tuple(_predictions(markers, plain)),
            tuple(_zero_snr(markers, plain)),
            tuple(_kinds(plain)),
            tuple(_claims(plain, "modelspec.encoder_layer", str)),
        )

    def prediction(self) -> str | None:
        """What the U-Net predicts, as far as the file says so.

        Raises:
            ConfigError: It says two things, or one that diffenc does not know.
        """
        claims = self.predictions
        if len({kind for _, kind in claims}) > 1:
            raise ConfigError(
                f"{self.where} contradicts itself: {_listed(claims)}. Pass "
                "prediction_type='epsilon' or 'v_prediction', whichever its authors state."
            )
        if not claims:
            return None
        source, kind = claims[0]
        if kind not in _PREDICTIONS.values():
            raise ConfigError(
                f"{self.where} says in {source} that it predicts {kind!r}; diffenc reads models "
                f"that predict one of {sorted(set(_PREDICTIONS.values()))}. Where that is wrong, "
                "pass prediction_type=."
            )
        return str(kind)

    def check_kind(self, kind: str) -> None:
        """Raise a `ConfigError` where the file calls itself another model than its shapes show."""
        for source, name in self.kinds:
            if name != kind:
                raise ConfigError(
                    f"{self.where} has the shapes of {kind!r} and says in {source} that it is "
                    f"{name!r}; where its metadata are wrong, pass architecture={kind!r}"
                )

    def scheduler(
        self, config: Mapping[str, Any], *, prediction_type: str | None, chosen: bool
    ) -> dict[str, Any]:
        """A scheduler's config with what the file says.

        Args:
            config: Config of the scheduler of the architecture that the file is read by, or of the
                model that the file belongs to.
            prediction_type: Prediction type that the caller states; it wins over the file and over
                the config. None leaves it to them.
            chosen: Whether the caller chose the config, so that it may contradict the file.

        Raises:
            ConfigError: The file contradicts itself, or a config that the caller chose.
        """
        values = dict(config)
        own = values.get("prediction_type", "epsilon")
        stated = prediction_type or self.prediction()
        if stated is not None and stated != own:
            if chosen and prediction_type is None:
                raise ConfigError(
                    f"{self.where} says that it predicts {stated!r} ({_listed(self.predictions)}), "
                    f"and the model that it is read as predicts {own!r}; pass prediction_type= "
                    "with the one that holds"
                )
            values["prediction_type"] = stated
        zero = {value for _, value in self.zero_snr}
        if len(zero) > 1:
            raise ConfigError(f"{self.where} contradicts itself: {_listed(self.zero_snr)}")
        if True in zero:
            if chosen and values.get("rescale_betas_zero_snr") is False:
                raise ConfigError(
                    f"{self.where} says that its last step is noise alone "
                    f"({_listed(self.zero_snr)}), and the scheduler of the model that it is read "
                    "as has rescale_betas_zero_snr=false; correct that config"
                )
            values["rescale_betas_zero_snr"] = True
        return values

    def text_encoder(self, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """The first text encoder's config, which ends at the layer that the file names.

        Args:
            config: Config of a `CLIPTextModel`.
            kind: Kind of the model: "sd1.5", "sd2.1" or "sdxl"; the last two read the last layer
                but one in any case.

        Raises:
            ConfigError: There is no such layer, or the model does not read it.
        """
        values = dict(config)
        layers = values.get("num_hidden_layers", 12)
        for source, stated in self.encoder_layers:
            known = range(1, layers + 1) if kind == "sd1.5" else (1, 2)
            if not stated.isdecimal() or int(stated[:4]) not in known:
                raise ConfigError(
                    f"{self.where} says in {source} that it reads layer {stated!r} of the text "
                    f"encoder from the end, which must be one of {list(known)}; pass text_encoder= "
                    "with the one that holds"
                )
            if kind == "sd1.5":
                values["num_hidden_layers"] = layers - int(stated) + 1
        return values


def _predictions(markers: Collection[str], plain: Mapping[str, str]) -> Iterator[Claim]:
    if "v_pred" in markers:
        yield "the tensor 'v_pred'", "v_prediction"
    yield from _claims(
        plain,
        "modelspec.prediction_type",
        lambda value: _PREDICTIONS.get(value.lower(), value),
    )
    for source, value in _truths(plain, "ss_v_parameterization"):
        yield source, "v_prediction" if value else "epsilon"
    architecture = plain.get("modelspec.architecture", "").lower()
    if architecture.startswith("stable-diffusion-v2-768-v"):
        yield "modelspec.architecture", "v_prediction"
    if architecture.startswith("stable-diffusion-v2-512"):
        yield "modelspec.architecture", "epsilon"
    if plain.get("ss_base_model_version", "").lower() in ("sd_v2_v", "sd_v1_v"):
        yield "ss_base_model_version", "v_prediction"


def _zero_snr(markers: Collection[str], plain: Mapping[str, str]) -> Iterator[Claim]:
    if "ztsnr" in markers:
        yield "the tensor 'ztsnr'", True
    yield from _truths(plain, "ss_zero_terminal_snr")


def _kinds(plain: Mapping[str, str]) -> Iterator[Claim]:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        for source, value in _claims(plain, key, str.lower):
            base = value.partition("/")[0]
            kind = next((kind for start, kind in _KINDS if base.startswith(start)), None)
            if any(variant in base for variant in _VARIANTS):
                kind = base
            if kind is not None:  # other words say nothing that the shapes do not
                yield source, kind
    for source, value in _truths(plain, "ss_v2"):
        if value:
            yield source, "sd2.1"


def _claims(plain: Mapping[str, str], key: str, read: Any) -> Iterator[Claim]:
    if (value := plain.get(key, "")).lower() not in ("", "none", "null"):
        yield key, read(value)


def _truths(plain: Mapping[str, str], key: str) -> Iterator[Claim]:
    known = {"true": True, "1": True, "false": False, "0": False}
    if (value := known.get(plain.get(key, "").lower())) is not None:
        yield key, value


def _listed(claims: Collection[Claim]) -> str:
    return " and ".join(f"{source} says {value!r}" for source, value in claims)
