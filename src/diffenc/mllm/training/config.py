"""What a training run does, as frozen dataclasses that are read from and written to TOML."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from textwrap import wrap
from typing import Any, Literal, get_args

from diffenc._typing import How
from diffenc.checks.arguments import whole
from diffenc.checks.fields import conform
from diffenc.config import EncoderConfig, check_choice
from diffenc.errors import ConfigError
from diffenc.inputs.policies import parse_policy
from diffenc.mixing.config import MIXED, MixingConfig
from diffenc.mllm.training.ground_config import GroundConfig
from diffenc.models.sources import lasting_source
from diffenc.storage.pretrained import absolute, lasting_name
from diffenc.storage.reading import read_toml
from diffenc.storage.schema import make
from diffenc.storage.writing import write_text

Stage = Literal["align", "instruct"]
"""A stage of LLaVA's recipe."""
Run = Literal["align", "instruct", "ground"]
"""What a run trains: a stage, or an encoder alone."""
EncoderKind = Literal["diffusion", "fused", "vision"]
LanguageTraining = Literal["none", "lora", "full"]
Precision = Literal["fp32", "bf16", "fp16"]
CacheMode = Literal["auto", "on", "off"]
Sharding = Literal["none", "zero2", "zero3"]
_WIDTH = 98


def _check_range(name: str, value: float, below: float = math.inf) -> None:
    """Raise unless `value` is from 0 to below a number; NaN is not."""
    if not 0 <= value < below:
        most = "" if below == math.inf else f" and below {below}"
        raise ConfigError(f"{name} must be finite, 0 or more{most}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Parts that the model is made of.

    Attributes:
        start: Folder that an earlier stage wrote. The parts come from there, and everything else
            that is said here about them must agree. "" makes the model of the parts named below.
        encoder: Name of the diffusion model, or of the vision model of a baseline.
        kind: Kind of the encoder: "diffusion", "fused" (with `clip`), or "vision", a baseline.
        options: Attributes of `EncoderConfig`, such as `timestep` or `guidance_scale`.
        clip: Name of the CLIP of a fused encoder.
        freeze_clip: Whether the CLIP of a fused encoder is frozen; false trains it in this stage.
        how: Way in which a fused encoder joins its two streams, see `FusedEncoder`. A way with
            weights trains them in both stages.
        mixing: Attributes of `MixingConfig`, such as `asks` or `heads`, for a `how` with weights.
            Without a seed of its own it takes the run's.
        layer: Index of the hidden state of CLIP, or of a baseline, that is read.
        pad: Whether a baseline's pictures are first padded to squares with the mean colour of its
            image processor, as LLaVA-1.5's second stage does.
        language_model: Name of the causal language model.
        projector: Kind of the projector, such as "linear" or "mlp2x_gelu".
        projector_norm: Whether a layer norm per tap stands before the projector; LLaVA has none.
        template: Name of the conversation template: "plain", "chat", "v1" or "auto"; see
            `diffenc.mllm.chat.Chat`. None is LLaVA's for the stage: "plain" to align, "auto" to
            instruct.
        captioner: Name of the CLIP of the implicit captioner, which trains too; "" is none.
        image_batch_size: Largest number of pictures per call of the encoder; None is all at once.
    """

    start: str = ""
    encoder: str = "sdxl"
    kind: EncoderKind = "diffusion"
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: str = ""
    freeze_clip: bool = True
    how: How = "channel"
    mixing: Mapping[str, Any] = field(default_factory=dict)
    layer: int = -2
    pad: bool = False
    language_model: str = "lmsys/vicuna-7b-v1.5"
    projector: str = "mlp2x_gelu"
    projector_norm: bool = True
    template: str | None = None
    captioner: str = ""
    image_batch_size: int | None = None

    def __post_init__(self) -> None:
        conform(self, "model.")
        if self.image_batch_size is not None:
            whole("model.image_batch_size", self.image_batch_size, least=1)
        check_choice("model.kind", self.kind, get_args(EncoderKind))
        check_choice("model.how", self.how, get_args(How))
        if self.template is not None:
            check_choice("model.template", self.template, ("auto", "chat", "v1", "plain"))
        if self.kind == "fused" and not (self.clip or self.start):
            raise ConfigError('model.kind = "fused" needs model.clip, the name of a CLIP or SigLIP')
        if self.kind == "vision" and (self.options or self.captioner):
            raise ConfigError('model.kind = "vision" takes no options and no captioner')
        if self.kind != "vision" and self.pad:
            raise ConfigError(
                'model.pad is for model.kind = "vision"; options = { resize = "pad" } pads for a '
                "diffusion model"
            )
        if self.kind != "fused" and not self.freeze_clip:
            raise ConfigError('model.freeze_clip = false is for model.kind = "fused"')
        if self.kind != "fused" and (self.mixing or self.how in MIXED):
            raise ConfigError(
                f'model.how = "{self.how}" and model.mixing are for model.kind = "fused"'
            )
        if self.kind != "fused":
            self._refuse_unread(("clip", "how"), 'model.kind = "fused"')
        if self.kind == "diffusion":
            self._refuse_unread(("layer",), 'model.kind = "fused" or "vision"')
        self.mixing_config()
        if self.kind != "vision":
            self.encoder_config()

    def _refuse_unread(self, names: Sequence[str], owner: str) -> None:
        """Raise where a value is stated that this kind of encoder does not read."""
        usual = {each.name: each.default for each in fields(self)}
        for name in names:
            if getattr(self, name) != usual[name]:
                raise ConfigError(
                    f"model.{name} = {getattr(self, name)!r} is for {owner}, and model.kind is "
                    f'"{self.kind}"; leave it out, or say the other kind'
                )

    def encoder_config(self) -> EncoderConfig:
        """The options, checked."""
        config = EncoderConfig.from_dict({**EncoderConfig().to_dict(), **self.options})
        usual = EncoderConfig().guidance_scale
        if config.guidance_scale != usual and config.conditioning != "cfg":
            raise ConfigError(
                f"model.options guidance_scale = {config.guidance_scale:g} is read with "
                'conditioning = "cfg" alone; add that, or leave the scale out'
            )
        return config

    def mixing_config(self, seed: int = 0) -> MixingConfig | None:
        """What `mixing` says, checked; None where nothing is mixed."""
        if self.how not in MIXED and not self.mixing:
            return None
        made: MixingConfig = make(MixingConfig, {"seed": seed, **self.mixing}, "model.mixing")
        made.check_read(self.how)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Data that the model learns from.

    Attributes:
        annotations: JSON or JSON-lines file with conversations in LLaVA's format; "" where an
            encoder is grounded alone.
        images: Folder to which the picture names in `annotations` are relative.
        prompts: Policy of the encoder's prompt, see `diffenc.inputs.policies.parse_policy`.
        skip_broken: Whether to train without the samples that cannot be used, instead of refusing
            to start. A sample whose picture breaks later is shown a blank one and teaches nothing.
        check_images: Whether to decode every picture before training begins; otherwise a picture
            that exists but cannot be decoded is noticed when its turn comes.
        limit: Number of records of the file that are looked at, from the first on; None is all.
        max_length: Largest number of tokens of a sample, pictures included; a longer sample is cut
            at its end.
        workers: Number of processes that read pictures.
        cache: Whether the tokens of a frozen encoder are kept on disk: "on", "off", or "auto",
            which keeps them where there are several epochs and every epoch has the same prompts.
        cache_gb: Largest size of the cache, in gigabytes (10^9 bytes); what does not fit is
            computed again.
        cache_dir: Folder of the cache; "" is `cache` in the run's folder. Runs may share one.
    """

    annotations: str = ""
    images: str = ""
    prompts: str = "question"
    skip_broken: bool = False
    check_images: bool = True
    limit: int | None = None
    max_length: int = 2048
    workers: int = 0
    cache: CacheMode = "auto"
    cache_gb: float = 50.0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        conform(self, "data.")
        check_choice("data.cache", self.cache, get_args(CacheMode))
        parse_policy(self.prompts)
        for name in ("limit", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be 1 or more, got {value}")
        _check_range("data.workers", self.workers)
        _check_range("data.cache_gb", self.cache_gb)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Options of the optimization. The defaults of a stage are in `LLAVA`.

    Attributes:
        learning_rate: Learning rate of the projector and of whatever else trains.
        batch_size: Number of samples per step, over all processes and accumulated batches.
        device_batch_size: Number of samples that one process takes at a time.
        epochs: Number of passes over the data.
        warmup: Share of the steps, from 0 to below 1, in which the learning rate rises.
        schedule: Name of a learning rate schedule of transformers.
        weight_decay: Weight decay of AdamW, 0 or more.
        max_grad_norm: Norm that gradients are clipped to; 0 clips nothing.
        precision: Precision of the computation and of the frozen weights: "fp32", "bf16" or "fp16".
            Trained weights stay in float32.
        gradient_checkpointing: Whether activations are computed again on the way back, which takes
            less memory for a third more time.
        shard: What is split over the processes of the run: "none" holds everything whole in each,
            "zero2" splits what trains and the language model between steps, "zero3" also while a
            step runs, where each layer is whole only while it computes. One process has nothing to
            split.
    """

    learning_rate: float
    batch_size: int
    device_batch_size: int
    epochs: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    shard: Sharding = "none"

    def __post_init__(self) -> None:
        conform(self, "optim.")
        check_choice("optim.precision", self.precision, get_args(Precision))
        check_choice("optim.shard", self.shard, get_args(Sharding))
        if self.shard != "none" and self.precision == "fp16":
            raise ConfigError(
                f'optim.shard = "{self.shard}" takes optim.precision = "bf16" or "fp32": losses in '
                "fp16 are scaled by what one process sees"
            )
        for name in ("batch_size", "device_batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"optim.learning_rate must be above 0, got {self.learning_rate}")
        _check_range("optim.weight_decay", self.weight_decay)
        _check_range("optim.max_grad_norm", self.max_grad_norm)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"optim.warmup is a share, 0 to below 1, got {self.warmup}")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        if self.batch_size % self.device_batch_size:
            raise ConfigError(
                f"optim.batch_size={self.batch_size} is no multiple of "
                f"optim.device_batch_size={self.device_batch_size}"
            )

    def accumulation(self, processes: int) -> int:
        """Batches that each process takes per step.

        Raises:
            ConfigError: The batch cannot be shared out evenly.
        """
        share = self.device_batch_size * processes
        if self.batch_size % share:
            raise ConfigError(
                f"optim.batch_size={self.batch_size} cannot be shared by {processes} processes "
                f"with optim.device_batch_size={self.device_batch_size}; it must be a multiple of "
                f"{share}"
            )
        return self.batch_size // share

    def steps(self, samples: int) -> int:
        """Number of optimizer steps over so many samples."""
        return math.ceil(samples / self.batch_size) * self.epochs


LLAVA: dict[Stage, OptimConfig] = {
    "align": OptimConfig(learning_rate=1e-3, batch_size=256, device_batch_size=32),
    "instruct": OptimConfig(learning_rate=2e-5, batch_size=128, device_batch_size=16),
}
"""Options of LLaVA-1.5 for each stage, from its published scripts: Liu et al. 2023,
arXiv:2310.03744."""

DEFAULTS: Mapping[Run, OptimConfig] = {
    "align": LLAVA["align"],
    "instruct": LLAVA["instruct"],
    "ground": OptimConfig(learning_rate=1e-4, batch_size=32, device_batch_size=8),
}
"""Options of each kind of run; the rate for grounding is that of diffusers' training of LoRA."""

_ADAPTED: Mapping[Run, dict[str, Any]] = {
    "align": {},
    "instruct": {"language_model": "full"},
    "ground": {"unet_rank": 16},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """What trains beside the projector in the second stage.

    Attributes:
        language_model: Part of the language model that trains: "full", "lora", or "none".
        rank: Rank of the language model's LoRA; this and the next two default to LLaVA-1.5's.
        alpha: Scale of the language model's LoRA.
        dropout: Dropout of the language model's LoRA.
        unet_rank: Rank of a LoRA on the U-Net's cross-attention; 0 is none.
        unet_alpha: Scale of the U-Net's LoRA; None is its rank.
        unet_dropout: Dropout of the U-Net's LoRA.
    """

    language_model: LanguageTraining = "none"
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    unet_rank: int = 0
    unet_alpha: float | None = None
    unet_dropout: float = 0.0

    def __post_init__(self) -> None:
        conform(self, "adapt.")
        check_choice("adapt.language_model", self.language_model, get_args(LanguageTraining))
        for name in ("alpha", "unet_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"adapt.{name} must be above 0, got {value}")
        for name in ("dropout", "unet_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"adapt.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.rank < 1 or self.unet_rank < 0:
            raise ConfigError("adapt.rank must be 1 or more, and adapt.unet_rank 0 or more")
        self._check_read()
        for name in ("alpha", "dropout", "unet_alpha", "unet_dropout"):
            if getattr(self, name) is not None:
                below = 1 if "dropout" in name else math.inf
                _check_range(f"adapt.{name}", getattr(self, name), below)

    def _check_read(self) -> None:
        """Raise where options of an adapter are stated that is not trained."""
        usual = {each.name: each.default for each in fields(self)}
        kinds = (
            (
                self.language_model == "lora",
                ("rank", "alpha", "dropout"),
                'language_model = "lora"',
            ),
            (self.unet_rank > 0, ("unet_alpha", "unet_dropout"), "unet_rank, such as 16"),
        )
        for trains, names, switch in kinds:
            stated = [name for name in names if getattr(self, name) != usual[name]]
            if stated and not trains:
                raise ConfigError(
                    f"adapt.{stated[0]} = {getattr(self, stated[0])} is of a LoRA that is not "
                    f"trained: set adapt.{switch}, or leave it out"
                )


def usual_adapt(run: Run) -> AdaptConfig:
    """What trains beside the projector where a config does not say."""
    return AdaptConfig(**_ADAPTED[run])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
        stage: Stage of the training: "align" trains the projector, and the implicit captioner where
            there is one; "instruct" also trains what `adapt` says; "ground" trains a LoRA of the
            encoder alone, see `ground`, without projector and language model.
        output: Folder of the run.
        seed: Seed of the order of samples, of the prompts, and of the weights that are initialised.
        model: Parts of the model.
        data: Data that the model learns from.
        optim: Options of the optimization; None is `LLAVA`'s for the stage, and to ground those in
            `DEFAULTS`.
        adapt: Parts that train beside the projector; None is nothing to align, the whole language
            model to instruct, and a LoRA of rank 16 on the U-Net to ground.
        ground: Phrases with boxes or masks, and the loss on attention to their words: all that is
            learnt to ground, beside the answers to instruct. None has none.
        save_steps: Number of steps between checkpoints; 0 writes none.
        keep: Number of the newest checkpoints that are kept.
        log_steps: Number of steps between lines of the log.

    Examples:
        >>> data = DataConfig(annotations="captions.json", images="pictures")
        >>> config = TrainConfig(stage="align", output="runs/align", data=data)
        >>> config.optim.learning_rate, config.optim.batch_size
        (0.001, 256)
    """

    stage: Run
    output: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig | None = None
    adapt: AdaptConfig | None = None
    ground: GroundConfig | None = None
    seed: int = 0
    save_steps: int = 500
    keep: int = 2
    log_steps: int = 10

    def __post_init__(self) -> None:
        conform(self)
        check_choice("stage", self.stage, get_args(Run))
        if self.optim is None:
            object.__setattr__(self, "optim", DEFAULTS[self.stage])
        if self.adapt is None:
            object.__setattr__(self, "adapt", usual_adapt(self.stage))
        if self.model.template is None:
            template = "auto" if self.stage == "instruct" else "plain"
            object.__setattr__(self, "model", replace(self.model, template=template))
        adapt = self.adapting
        if self.stage == "align" and (adapt.language_model != "none" or adapt.unet_rank):
            raise ConfigError('stage = "align" trains no language model and no LoRA; see [adapt]')
        if adapt.unet_rank and self.model.kind == "vision":
            raise ConfigError("adapt.unet_rank is for a diffusion model, and model.kind is vision")
        self._check_data()
        self._check_ground()
        self.check_words(self.model.options.get("tokens", "grid"))
        _check_range("seed", self.seed, 2**32)
        if self.save_steps < 0 or self.keep < 1 or self.log_steps < 1:
            raise ConfigError("save_steps must be 0 or more, keep and log_steps 1 or more")

    def check_words(self, kind: str) -> None:
        """Raise where tokens are of words and prompts never have any.

        Args:
            kind: Kind of the encoder's tokens, which a saved encoder or an earlier stage may bring.

        Raises:
            ConfigError: They are.
        """
        policy = self.data.prompts
        if (
            self.stage != "ground"
            and kind != "grid"
            and policy.partition("|")[0].strip() == "empty"
        ):
            raise ConfigError(
                f"tokens = {kind!r} (model.options) are gathered by the words of a prompt, and "
                f'data.prompts = "{policy}" has none; take "question", "caption" or tokens = "grid"'
            )

    def _check_data(self) -> None:
        """Raise unless there are conversations where they are learnt from, and nowhere else."""
        names = ("annotations", "images")
        if self.stage == "ground":
            shared = ("workers", "skip_broken", "check_images")
            for each in fields(DataConfig):
                if each.name not in shared and getattr(self.data, each.name) != each.default:
                    raise ConfigError(
                        f'data.{each.name} is for conversations, and stage = "ground" learns from '
                        "phrases, which are named in [ground] with annotations, images and limit; "
                        f"in [data] it reads {', '.join(shared)}"
                    )
        elif missing := [f"data.{name}" for name in names if not getattr(self.data, name)]:
            raise ConfigError(f"a key is missing: {', '.join(missing)}")

    def _check_ground(self) -> None:
        """Raise unless what is grounded trains, and can be grounded."""
        adapt, model = self.adapting, self.model
        if self.ground is None:
            if self.stage == "ground":
                raise ConfigError('stage = "ground" needs [ground] with annotations and images')
            return
        if not adapt.unet_rank:
            raise ConfigError(
                "[ground] teaches a LoRA on the U-Net: set adapt.unet_rank, such as 16, in the "
                'stage "instruct" or "ground"'
            )
        if self.stage == "instruct":
            if self.ground.denoising:
                raise ConfigError(
                    'ground.denoising is for stage = "ground": beside a language model the U-Net '
                    "ends after the last tap and predicts no noise; leave it out"
                )
            if self.optimizing.shard != "none":
                raise ConfigError(
                    "[ground] beside a language model that is split (optim.shard) is not "
                    'implemented: ground the encoder first, with stage = "ground", and name its '
                    "folder as model.encoder"
                )
            return
        alone = model.kind == "diffusion" and not model.start and not model.captioner
        if not alone or adapt.language_model != "none":
            raise ConfigError(
                'stage = "ground" trains the LoRA of one diffusion model alone: leave out '
                "model.kind, model.start, model.captioner and adapt.language_model"
            )
        if self.optimizing.shard != "none":
            raise ConfigError('optim.shard is for language models; stage = "ground" has none')

    @property
    def optimizing(self) -> OptimConfig:
        """`optim`, which is never None."""
        assert self.optim is not None
        return self.optim

    @property
    def adapting(self) -> AdaptConfig:
        """`adapt`, which is never None."""
        assert self.adapt is not None
        return self.adapt

    @property
    def keeps_tokens(self) -> bool:
        """Whether the encoder's tokens are kept on disk, if it is frozen."""
        mode, policy = self.data.cache, self.data.prompts
        if mode != "auto":
            return mode == "on"
        baseline = self.model.kind == "vision"
        changes = "|" in policy
        sources = policy.split("|")[0].replace(" ", "").split("+")
        drawn = any(word in ("question", "caption") for word in sources)
        return self.optimizing.epochs > 1 and (baseline or not (changes or drawn))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Make a config of nested values, as TOML gives them.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed.
        """
        remaining = dict(values)
        stage: Any = remaining.get("stage")
        check_choice("stage", stage, get_args(Run))
        kinds: dict[str, tuple[type, Mapping[str, Any]]] = {
            "model": (ModelConfig, {}),
            "data": (DataConfig, {}),
            "adapt": (AdaptConfig, _ADAPTED[stage]),
            "ground": (GroundConfig, {}),
            "optim": (OptimConfig, asdict(DEFAULTS[stage])),
        }
        tables: dict[str, Any] = {}
        for name, (kind, defaults) in kinds.items():
            if name in remaining:
                table = _table(remaining.pop(name), name)
                tables[name] = make(kind, {**defaults, **table}, name)
        config: TrainConfig = make(cls, remaining, own=tables)
        return config

    @classmethod
    def read(cls, path: "str | os.PathLike[str]") -> "TrainConfig":
        """Read a config from a TOML file. Paths in it are relative to the current folder.

        Raises:
            ConfigError: It cannot be read, or see `from_dict`.
        """
        return cls.from_dict(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        """Nested values, without those that are None."""
        return _plain(asdict(self))

    def lasting(self) -> "TrainConfig":
        """The same with absolute paths, which mean the same in every directory."""
        model, data = self.model, self.data
        source = lasting_name if model.kind == "vision" else lasting_source
        names: dict[str, Any] = {
            key: lasting_name(value)
            for key in ("clip", "language_model", "captioner")
            if (value := getattr(model, key))
        }
        files: dict[str, Any] = {
            key: absolute(value)
            for key in ("annotations", "images", "cache_dir")
            if (value := getattr(data, key))
        }
        start = absolute(model.start) if model.start else ""
        ground = self.ground
        if ground is not None:
            named, folder = absolute(ground.annotations), absolute(ground.images)
            ground = replace(ground, annotations=named, images=folder)
        return replace(
            self,
            ground=ground,
            output=absolute(self.output),
            model=replace(model, start=start, encoder=source(model.encoder), **names),
            data=replace(data, **files),
        )

    def write(self, path: "str | os.PathLike[str]") -> None:
        """Write the config as TOML, from which `read` makes an equal config.

        Raises:
            OutputError: The file cannot be written.
        """
        write_text(path, to_toml(self.to_dict()))


def to_toml(values: Mapping[str, Any], *, comments: Mapping[str, str] | None = None) -> str:
    """Nested values of text, numbers, truth and lists as TOML.

    Args:
        values: Values by key; those of a table are a mapping of their own.
        comments: Remarks that stand above single values, by dotted key; None has none.
    """
    lines: list[str] = []
    remarks = comments or {}

    def add(table: Mapping[str, Any], path: str) -> None:
        for key, value in table.items():
            if not isinstance(value, Mapping):
                lines.extend(f"# {line}" for line in wrap(remarks.get(path + key, ""), _WIDTH))
                lines.append(f"{key} = {_written(value)}")
        for key, value in table.items():
            if isinstance(value, Mapping):
                lines.extend(["", f"[{path}{key}]"])
                add(value, f"{path}{key}.")

    add(values, "")
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(dict(value)) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table: write [{name}] and its keys below")
    return dict(value)
