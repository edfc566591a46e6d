"""What a scorer is told to do: its options, the presets of published scores, their timesteps."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from diffenc._typing import LongPrompts, Posterior, Resize, Reused, Uncond
from diffenc.checks.arguments import whole
from diffenc.checks.fields import conform
from diffenc.config import check_choice, check_pair, make_options
from diffenc.errors import ConfigError, near_matches

ScoreMode = Literal["exact", "shared-query"]
Space = Literal["logits", "probs"]
PoolAxis = Literal["tokens", "pixels", "both"]
TokenMask = Literal["none", "no_pad", "content"]
HeadReduce = Literal["mean", "max"]
ErrorTerm = Literal["l2_flow", "l2_flow_gap", "l2_gap", "mse", "mse_gap"]
Calibration = Literal["gray", "neutral", "given"]

SCORE_TIMESTEPS = (189, 389, 589, 789, 989)
"""Noise levels of scores and word maps, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerConfig:
    """How an image and a text become a number; higher is a better match.

    The score is the mean over timesteps and draws of an attention part, an error part, or their
    sum. Attention part: per layer and head the scaled products q·k of cells and tokens become one
    number by log-sum-exp; then the mean over layers.

    Attributes:
        attention: Whether there is an attention part.
        layers: Cross-attentions that are read: "all", the "discffusion" set (of the last down block
            with attention, the middle and the last up block, the last block of each transformer),
            or a tuple of module paths.
        layer_weights: Weights of the layers, one each, in the order in which the layers run; None
            weighs all alike.
        space: Values that are pooled: the "logits" (q·k / sqrt(d)), or "probs", their softmax over
            tokens.
        lse_axis: Axes of the log-sum-exp. "tokens" takes it over tokens, then the mean over cells;
            "pixels" takes it over cells, then the mean over tokens; "both" takes it over all.
        lse_lambda: Factor λ in (1/λ) log Σ exp(λ a); a large one approaches the maximum.
        token_mask: Tokens that are pooled: all ("none"), without padding ("no_pad": start, words,
            end), or the words alone ("content").
        head_reduce: Reduction over heads: "mean" or "max".
        include_uncond: Whether the attention part is averaged with that of the unconditional half.
        error_term: Kind of the error part. "mse" is minus the mean squared error of the predicted
            noise; "mse_gap" is that error without the text minus that with it; "l2_gap" is the same
            difference of Euclidean norms. "l2_flow" is minus the norm of the error of the flow, and
            "l2_flow_gap" its difference, for models that match flows. None leaves the part out.
        timesteps: Noise levels, as scheduler steps.
        draws: Number of noise tensors per timestep.
        seed: Seed of the noise, which all images, texts and halves share.
        posterior: Way in which latents are taken from the VAE's posterior: its "mode", or a seeded
            "sample".
        uncond: Unconditional embedding: "zeros", "empty" (the empty text's), or None for the
            model's own rule.
        long_prompts: Treatment of texts that are longer than the text encoder reads: "truncate"
            cuts them, with one warning; "chunk" reads them in windows side by side.
        mode: Way in which the U-Net runs: "exact" runs it under each text; "shared-query" runs it
            once per image and noise, under `query_prompt`, and matches its queries with the keys of
            every text.
        query_prompt: Prompt of the one pass of "shared-query"; the empty text is encoded, never
            replaced by zeros.
        reuse: Part of the U-Net that runs without the text, once per image and noise for all texts:
            "down" is everything before the middle, "middle" everything before the decoder. Faster
            for many texts and approximate, see `EncoderConfig.reuse`. None runs all of it under
            each text.
        calibration: Reference images whose mean score is subtracted from each text's scores: a
            "gray" one, a "neutral" set, or those "given" to `CrossAttnScorer.calibrate`. None
            subtracts nothing.
        reference_texts: Texts whose mean score is subtracted from each image's scores.
        reference_digest: Number and digest of the given reference images, as written by
            `calibrate`.
        size: Side of the square that images are brought to, or (height, width), in pixels; None
            takes the backbone's own.
        resize: Way in which images are brought to `size`, see `EncoderConfig.resize`.
        batch_size: Largest number of rows (images x texts x timesteps x draws) per call of the
            U-Net.
    """

    attention: bool = True
    layers: str | tuple[str, ...] = "all"
    layer_weights: tuple[float, ...] | None = None
    space: Space = "logits"
    lse_axis: PoolAxis = "tokens"
    lse_lambda: float = 1.0
    token_mask: TokenMask = "none"
    head_reduce: HeadReduce = "mean"
    include_uncond: bool = False
    error_term: ErrorTerm | None = None
    timesteps: tuple[int, ...] = SCORE_TIMESTEPS
    draws: int = 1
    seed: int = 0
    posterior: Posterior = "mode"
    uncond: Uncond | None = None
    long_prompts: LongPrompts = "truncate"
    mode: ScoreMode = "exact"
    query_prompt: str = ""
    reuse: Reused | None = None
    calibration: Calibration | None = None
    reference_texts: tuple[str, ...] = ()
    reference_digest: str | None = None
    size: int | tuple[int, int] | None = None
    resize: Resize = "squash"
    batch_size: int = 16

    def __post_init__(self) -> None:
        conform(self)
        self._check_statistic()
        self._check_combinations()
        if not self.timesteps:
            raise ConfigError("timesteps must hold one scheduler step or more, got none")
        for step in self.timesteps:
            if not 0 <= step < 1000:
                raise ConfigError(f"timesteps must be ints in [0, 1000), got {step!r}")
        if len(set(self.timesteps)) < len(self.timesteps):
            raise ConfigError(
                f"timesteps hold one twice: {self.timesteps}; more noise at a level is draws=2"
            )
        for name in ("draws", "batch_size"):
            whole(name, getattr(self, name), least=1)
        check_pair("size", self.size)
        check_choice("resize", self.resize, get_args(Resize))
        check_choice("posterior", self.posterior, get_args(Posterior))
        check_choice("long_prompts", self.long_prompts, get_args(LongPrompts))
        if self.uncond is not None:
            check_choice("uncond", self.uncond, get_args(Uncond))

    def _check_statistic(self) -> None:
        if isinstance(self.layers, str):
            check_choice("layers", self.layers, ("all", "discffusion"))
        elif not self.layers or not all(isinstance(layer, str) for layer in self.layers):
            raise ConfigError(
                "layers must be 'all', 'discffusion' or a tuple of module paths with at least one "
                f"entry, got {self.layers!r}"
            )
        if self.layer_weights is not None:
            usable = all(w >= 0 for w in self.layer_weights)
            if not usable or not sum(self.layer_weights) > 0:
                raise ConfigError(
                    "layer_weights must be finite, 0 or above and not all 0, got "
                    f"{self.layer_weights}"
                )
        if not self.lse_lambda > 0:
            raise ConfigError(f"lse_lambda must be a number above 0, got {self.lse_lambda}")
        check_choice("space", self.space, get_args(Space))
        check_choice("lse_axis", self.lse_axis, get_args(PoolAxis))
        check_choice("token_mask", self.token_mask, get_args(TokenMask))
        check_choice("head_reduce", self.head_reduce, get_args(HeadReduce))
        check_choice("mode", self.mode, get_args(ScoreMode))
        if self.error_term is not None:
            check_choice("error_term", self.error_term, get_args(ErrorTerm))
        if self.reuse is not None:
            check_choice("reuse", self.reuse, get_args(Reused))
        if self.calibration is not None:
            check_choice("calibration", self.calibration, get_args(Calibration))

    def _check_combinations(self) -> None:
        if not self.attention and self.error_term is None:
            raise ConfigError("there is nothing to score by: attention is off, error_term is None")
        if self.mode == "shared-query" and (self.error_term or not self.attention):
            raise ConfigError(
                "mode 'shared-query' scores by attention alone, since the error of a text needs a "
                "pass of its own; set error_term=None, or mode='exact'"
            )
        if self.mode == "shared-query" and self.reuse is not None:
            raise ConfigError(
                f"reuse={self.reuse!r} saves nothing with mode 'shared-query', which runs once for "
                "all texts; leave it out, or set mode='exact'"
            )
        if self.include_uncond and self.token_mask == "content":
            raise ConfigError(
                "token_mask 'content' leaves nothing of the unconditional half; set "
                "include_uncond=False or another mask"
            )
        if self.include_uncond and not self.attention:
            raise ConfigError("include_uncond belongs to the attention part, which is off")

    def check_read(self, stated: Iterable[str]) -> None:
        """Refuse options that were stated and that nothing reads.

        Args:
            stated: Names of the options that somebody stated, and that no preset brought.

        Raises:
            ConfigError: There is one.
        """
        unread = set(stated)
        if not self.attention and (names := sorted(unread & ATTENTION_OPTIONS)):
            raise ConfigError(
                f"{', '.join(names)}: read by the attention part of a score, and this one has an "
                "error part alone; leave that out, or take a preset with attention, such as "
                "'calibrated'"
            )
        if "uncond" in unread and self.uncond is not None and not self.needs_uncond:
            raise ConfigError(
                "uncond is the embedding of the part of a score without the text, and this one has "
                "none: leave it out, or take include_uncond=True or an error_term such as 'l2_gap'"
            )
        if self.mode == "exact" and "query_prompt" in unread:
            raise ConfigError(
                "query_prompt is read by mode='shared-query' alone; pass that too, or leave it out"
            )

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Every (timestep, draw), in the order in which they are scored."""
        return tuple((t, draw) for t in self.timesteps for draw in range(self.draws))

    @property
    def needs_uncond(self) -> bool:
        """Whether a score has a part without the text."""
        return self.include_uncond or self.error_term in ("l2_gap", "mse_gap", "l2_flow_gap")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScorerConfig":
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A key is no attribute, or a value is not allowed.
        """
        made: ScorerConfig = make_options(cls, values)
        return made


def discffusion_timesteps(steps: int) -> tuple[int, ...]:
    """Noise levels of Discffusion's released code, which are those of the paper for 5 steps.

    Args:
        steps: Value of that code's `sampling_steps`, 1 to 1000; for some values one noise level
            fewer is given.

    Raises:
        ConfigError: Out of range.

    Examples:
        >>> discffusion_timesteps(5)
        (189, 389, 589, 789, 989)

    Source:
        He et al. 2023 (Discffusion), arXiv:2305.10722, released code: of 999 to 0 ten are left out
        at both ends.
    """
    _check_count(steps)
    return tuple(range(999, -1, -1)[10:990][:: 1000 // steps])[::-1]


def classifier_timesteps(steps: int, of: int | None = None) -> tuple[int, ...]:
    """Noise levels of Diffusion Classifier: evenly spaced and centred.

    Args:
        steps: Number of noise levels.
        of: Size of the grid whose first stage these levels are; None is `steps` itself.

    Raises:
        ConfigError: Out of range.

    Examples:
        >>> classifier_timesteps(5, of=20)
        (125, 325, 525, 725, 925)

    Source:
        Li et al. 2023 (Diffusion Classifier), arXiv:2303.16203, appendix and released code.
    """
    _check_count(steps)
    whole = steps if of is None else of
    _check_count(whole)
    if steps > whole:
        raise ConfigError(f"a grid of {whole} timesteps has no {steps}")
    interval, every = 1000 // whole, whole // steps
    grid = [interval // 2 + interval * index for index in range(whole)]
    return tuple(grid[every // 2 :: every][:steps])


def itm_timesteps(steps: int) -> tuple[int, ...]:
    """Noise levels of DiffusionITM's released code.

    Args:
        steps: Value of that code's `sampling_steps`, 1 to 1000; for large values fewer noise levels
            are given.

    Raises:
        ConfigError: Out of range.

    Examples:
        >>> itm_timesteps(5)
        (10, 210, 410, 610, 810)

    Source:
        Krojer et al. 2023 (DiffusionITM), arXiv:2305.16397, released code: from 10 to below 990.
    """
    _check_count(steps)
    return tuple(range(10, 990, 1000 // steps))


def self_bench_timesteps(steps: int = 30) -> tuple[int, ...]:
    """Noise levels of Self-Bench for Stable Diffusion 3, ascending, to the nearest whole step.

    They are spread over the schedule's own steps, whose shift of 3 crowds them at much noise.

    Args:
        steps: Number of noise levels, 1 to 30, of which the first ones are taken.

    Raises:
        ConfigError: Another number.

    Examples:
        >>> self_bench_timesteps(4)
        (66, 151, 227, 294)

    Source:
        "Diffusion Classifiers Understand Compositionality, but Conditions Apply" (Self-Bench),
        arXiv:2505.17955, released code.
    """
    if not 1 <= whole("the number of timesteps", steps) <= 30:
        raise ConfigError(f"the number of timesteps must be in [1, 30], got {steps}")
    shares = [1 - (20 + 33 * index) / 1000 for index in reversed(range(30))]
    return tuple(round(1000 * 3 * share / (1 + 2 * share)) for share in shares[:steps])


def _check_count(count: int) -> None:
    if not 1 <= whole("the number of timesteps", count) <= 1000:
        raise ConfigError(f"the number of timesteps must be in [1, 1000], got {count}")


ATTENTION_OPTIONS = frozenset(
    (
        *("layers", "layer_weights", "space", "lse_axis", "lse_lambda"),
        *("token_mask", "head_reduce", "include_uncond"),
    )
)
"""Attributes of `ScorerConfig` that belong to the attention part."""

DECODER = ("up_blocks",)
"""The decoder of a U-Net. A transformer has none, and presets read all of its layers."""

_PRESETS: dict[str, dict[str, Any]] = {
    # The earlier draft's text: attention of all layers, conditional half, five timesteps.
    "paper": {},
    # Each word where it is seen best, in the decoder, without each text's own offset. Chosen on
    # validation scenes of the miniature, see the guide on scores.
    "calibrated": {
        "layers": DECODER,
        "lse_axis": "pixels",
        "token_mask": "content",
        "calibration": "gray",
    },
    # He et al. 2023, arXiv:2305.10722, as released: six modules of SD, both halves, a sample of
    # the posterior, norms of errors. The released mean over the batch is a mean per sample here;
    # timesteps are the paper's five, where the released script takes 30.
    "discffusion": {
        "layers": "discffusion",
        "include_uncond": True,
        "error_term": "l2_gap",
        "uncond": "empty",
        "posterior": "sample",
    },
    # Li et al. 2023, arXiv:2303.16203, as released: the mean of the posterior, cropped pictures,
    # the first stage of a grid of 20 timesteps.
    "diffusion-classifier": {
        "attention": False,
        "error_term": "mse",
        "timesteps": classifier_timesteps(5, of=20),
        "resize": "crop",
    },
    # Krojer et al. 2023, arXiv:2305.16397, as released with `--img_retrieval`: the norm of the
    # error without the text less that with it, at its ten timesteps, from a posterior's sample.
    "diffusion-itm": {
        "attention": False,
        "error_term": "l2_gap",
        "timesteps": itm_timesteps(10),
        "uncond": "empty",
        "posterior": "sample",
    },
    # Self-Bench, arXiv:2505.17955, as released for SD 3: the norm of the error of the flow, at
    # thirty steps of the schedule.
    "self-bench": {
        "attention": False,
        "error_term": "l2_flow",
        "timesteps": self_bench_timesteps(),
    },
    # Nobody's release: Diffusion Classifier's error, less that without the text, so that images of
    # a text compare.
    "denoising-gap": {
        "attention": False,
        "error_term": "mse_gap",
        "timesteps": classifier_timesteps(5, of=20),
        "uncond": "empty",
    },
}


def scorer_preset(name: str) -> dict[str, Any]:
    """Options of `ScorerConfig` for a kind of score.

    What each follows, and where it differs from what was released, stands in the guide on scores.

    Args:
        name: Name of the preset: "paper", "calibrated", "discffusion", "diffusion-classifier",
            "diffusion-itm", "self-bench" or "denoising-gap".

    Raises:
        ConfigError: No such preset.
    """
    if name not in _PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}.{near_matches(name, _PRESETS)} Known are {sorted(_PRESETS)}."
        )
    return dict(_PRESETS[name])


def scorer_presets() -> tuple[str, ...]:
    """Names that `scorer_preset` knows."""
    return tuple(_PRESETS)
