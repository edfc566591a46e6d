"""Scorers as benchmarks use them, and what their scores depend on."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffenc.errors import ConfigError
from diffenc.evals.matching.sizes import tower_sizes
from diffenc.inputs.prompts import tokenize
from diffenc.memory.digests import adapters_in_use
from diffenc.scorer import CrossAttnScorer
from diffenc.scoring.config import ATTENTION_OPTIONS, scorer_preset
from diffenc.scoring.encoded_call import cuts_known
from diffenc.storage.names import is_folder

_SAMPLED = 64
_NO_RESULT = ("seed", "batch_size")


class ScorerMatcher:
    """A `CrossAttnScorer` in an evaluation.

    Args:
        scorer: Scorer that gives the scores; the seed of its config is not used.
        name: Name of the model in tables; None takes the backbone's.
        by_timestep: Whether to give one score per timestep, as a third axis, instead of their mean.
    """

    deterministic = False

    def __init__(
        self, scorer: CrossAttnScorer, *, name: str | None = None, by_timestep: bool = False
    ) -> None:
        self.scorer, self.by_timestep = scorer, by_timestep
        self.name = name or scorer.backbone.name
        config, parts = scorer.config.to_dict(), scorer.backbone.parts()
        # Scores that were written before there was `reuse` are those without it.
        left_out = (*_NO_RESULT, *(["reuse"] if config["reuse"] is None else []))
        image = [part for name, part in parts.items() if not name.startswith("text")]
        self.parameters = tower_sizes(nn.ModuleList(parts.values()), *image)
        self.description: Mapping[str, Any] = {
            "kind": "CrossAttnScorer",
            "model": scorer.backbone.name,
            "weights": weights_digest(parts.items()),
            "dtype": str(scorer.backbone.dtype).removeprefix("torch."),
            "config": {key: value for key, value in config.items() if key not in left_out},
            "by_timestep": by_timestep,
        }

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], *, seed: int) -> Tensor:
        """Scores (images, texts), or (images, texts, timesteps)."""
        with cuts_known():  # texts that are cut were counted before
            if not self.by_timestep:
                scores: Tensor = self.scorer(list(images), list(texts), seed=seed)
                return scores
            return self.scorer.score(list(images), list(texts), seed=seed).by_timestep[0]

    def truncated(self, texts: Sequence[str]) -> Sequence[int]:
        """Largest number of tokens of each text that one of the text encoders does not read."""
        backbone = self.scorer.backbone
        tokenizers = [
            getattr(backbone, name)
            for name in ("tokenizer", "tokenizer_2")
            if getattr(backbone, name, None) is not None
        ]
        counts = [tokenize(tokenizer, texts)[1] for tokenizer in tokenizers]
        return [max(each) for each in zip(*counts, strict=True)]


def scorer_matchers(
    scorer: CrossAttnScorer,
    specs: Sequence[str],
    options: Mapping[str, Any],
    *,
    by_timestep: bool = False,
) -> list[ScorerMatcher]:
    """One matcher per name of a preset, over one backbone.

    Args:
        scorer: Scorer whose backbone and reference images are shared.
        specs: Names of presets, "paper", "calibrated", ... or, for one pass per image,
            "calibrated+shared-query".
        options: Fields of `ScorerConfig` that replace those of every preset that reads them.
        by_timestep: Whether scores are given for each timestep, see `ScorerMatcher`.

    Raises:
        ConfigError: An unknown preset, or one that does not go with the options.
    """
    matchers = []
    for spec in dict.fromkeys(specs):
        preset, _, mode = spec.partition("+")
        if mode not in ("", "shared-query"):
            raise ConfigError(
                f"a score is a preset's name, or one with '+shared-query' behind it; got {spec!r}"
            )
        own = {"mode": "shared-query"} if mode else {}
        reads = scorer_preset(preset).get("attention", True)
        read = {k: v for k, v in options.items() if reads or k not in ATTENTION_OPTIONS}
        made = scorer.with_options(preset=preset, **{**own, **read})
        name = f"{short_name(scorer.backbone.name)} {spec}"
        matchers.append(ScorerMatcher(made, name=name, by_timestep=by_timestep))
    return matchers


def short_name(name: str) -> str:
    """An alias or id as it is, a folder without what it lies in."""
    path = Path(name)
    return path.resolve().name if is_folder(path) else name


def weights_digest(parts: Iterable[tuple[str, nn.Module]]) -> str:
    """A digest of a few numbers of every parameter, and of adapters: other weights have another."""
    digest = hashlib.sha256()
    for part, module in parts:
        for name, parameter in module.named_parameters():
            flat = parameter.detach().flatten()
            picked = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(f"{part}.{name} {tuple(parameter.shape)}".encode())
            digest.update(picked.to("cpu", torch.float32).numpy().tobytes())
        digest.update(adapters_in_use(module).encode())
    return digest.hexdigest()[:16]
