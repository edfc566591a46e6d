"""BLEU-4, ROUGE-L, CIDEr and SPICE by pycocoevalcap, in percent."""

import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diffenc._optional import require
from diffenc.config import check_choice
from diffenc.errors import ConfigError, NonFiniteError
from diffenc.evals.captioning.tokens import Tokenizer, require_java, require_tokenizer, tokenize
from diffenc.storage.names import is_file

Metric = Literal["rouge-l", "cider", "bleu-4", "spice"]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""In the order of the paper's tables."""

TITLES: Mapping[Metric, str] = {
    "rouge-l": "ROUGE-L",
    "cider": "CIDEr",
    "bleu-4": "BLEU-4",
    "spice": "SPICE",
}
WITHOUT_JAVA: tuple[Metric, ...] = ("rouge-l", "cider", "bleu-4")

_MODULES: Mapping[Metric, tuple[str, str]] = {
    "rouge-l": ("pycocoevalcap.rouge.rouge", "Rouge"),
    "cider": ("pycocoevalcap.cider.cider", "Cider"),
    "bleu-4": ("pycocoevalcap.bleu.bleu", "Bleu"),
    "spice": ("pycocoevalcap.spice.spice", "Spice"),
}
_SPICE_PARSER = "stanford-corenlp-3.6.0.jar"

_Words = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Agreement of captions with reference captions.

    Attributes:
        values: Value of each metric over all images, times 100.
        images: Value of each metric for each image, by image id, times 100; BLEU-4 over all images
            is no mean of these.
        tokenizer: Tokenizer that split the texts into words.
        empty: Number of captions without a single word.
    """

    values: Mapping[Metric, float]
    images: Mapping[Metric, Mapping[str, float]]
    tokenizer: Tokenizer
    empty: int


def require_metrics(metrics: Sequence[Metric], tokenizer: Tokenizer) -> None:
    """Refuse metrics that cannot run here, before anything is generated.

    Raises:
        ConfigError: An unknown metric or one that stands twice, no Java, or no parser for SPICE.
        MissingExtraError: pycocoevalcap is not installed.
    """
    for metric in metrics:
        check_choice("metrics", metric, METRICS)
    if len(set(metrics)) < len(metrics):
        raise ConfigError(f"metrics must stand once each, got {list(metrics)}")
    if metrics:
        require_tokenizer(tokenizer)
    for metric in metrics:
        require(_MODULES[metric][0], extra="caption")
    if "spice" in metrics:
        require_java("SPICE", "or leave it out of metrics")
        folder = Path(str(require(_MODULES["spice"][0], extra="caption").__file__)).parent
        if not is_file(folder / "lib" / _SPICE_PARSER):
            raise ConfigError(
                f"SPICE needs {_SPICE_PARSER} in {folder / 'lib'}, and nothing is downloaded "
                "unasked: run 'python -m pycocoevalcap.spice.get_stanford_models', or leave SPICE "
                "out of metrics"
            )


def score_captions(
    references: Mapping[str, Sequence[str]],
    captions: Mapping[str, str],
    *,
    metrics: Sequence[Metric] = WITHOUT_JAVA,
    tokenizer: Tokenizer = "ptb",
) -> CaptionScores:
    """Compare one caption per image with its references.

    Args:
        references: Reference captions of each image by id, one or more per image.
        captions: Caption of each of the same images, by id; an empty one counts as 0.
        metrics: Names of the metrics, which are computed by pycocoevalcap. "spice" needs Java and
            its own parser.
        tokenizer: Tokenizer of the texts: "ptb" (needs Java) as in published numbers, or "simple".

    Raises:
        ConfigError: Other images in one than in the other, an image without references, CIDEr for
            a single image, or something that a metric needs is missing.
        MissingExtraError: pycocoevalcap is not installed.

    Source:
        Papineni et al. 2002 (BLEU); Lin 2004 (ROUGE), with beta 1.2; Vedantam et al. 2015 (CIDEr,
        here CIDEr-D), whose word weights come from the references that are given, so that subsets
        do not compare; Anderson et al. 2016 (SPICE).
    """
    require_metrics(metrics, tokenizer)
    _check(references, captions, metrics)
    words = tokenize(references, tokenizer)
    said = tokenize({key: [captions[key]] for key in references}, tokenizer)
    results = {metric: _run(metric, words, said) for metric in metrics}
    return CaptionScores(
        values={metric: 100 * value for metric, (value, _) in results.items()},
        images={
            metric: {key: 100 * value for key, value in zip(words, rows, strict=True)}
            for metric, (_, rows) in results.items()
        },
        tokenizer=tokenizer,
        empty=sum(not texts[0] for texts in said.values()),
    )


def _check(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], metrics: Sequence[Metric]
) -> None:
    if not references:
        raise ConfigError("there is no image to score; give one or more")
    if different := sorted(references.keys() ^ captions.keys()):
        raise ConfigError(
            f"{len(different)} images have either references or a caption alone: "
            f"{', '.join(map(repr, different[:5]))}; give exactly one caption for each image"
        )
    if bare := [key for key, texts in references.items() if isinstance(texts, str) or not texts]:
        raise ConfigError(
            f"{len(bare)} images have no list of references: {', '.join(map(repr, bare[:5]))}"
        )
    if "cider" in metrics and len(references) < 2:
        raise ConfigError(
            "CIDEr weighs words by how few images have them, so a single image always gets 0; "
            "score two images or more, or leave 'cider' out of metrics"
        )


def _run(metric: Metric, references: _Words, said: _Words) -> tuple[float, list[float]]:
    """The value over all images and per image, 0 to 1 (CIDEr: to 10)."""
    module, name = _MODULES[metric]
    scorer = getattr(require(module, extra="caption"), name)()
    value, images = _READERS[metric](scorer, dict(references), dict(said))
    if not all(map(math.isfinite, (value, *images))):
        raise NonFiniteError(f"{metric} gave NaN or infinity")
    return value, images


def _bleu(scorer: Any, references: Any, said: Any) -> tuple[float, list[float]]:
    values, images = scorer.compute_score(references, said, verbose=0)
    return float(values[3]), [float(value) for value in images[3]]


def _plain(scorer: Any, references: Any, said: Any) -> tuple[float, list[float]]:
    value, images = scorer.compute_score(references, said)
    return float(value), [float(value) for value in images]


def _spice(scorer: Any, references: Any, said: Any) -> tuple[float, list[float]]:
    # It sorts ids, so that numbers as text would come out in another order than they went in.
    names = {f"{index:08d}": key for index, key in enumerate(references)}
    try:
        _, images = scorer.compute_score(
            {name: references[key] for name, key in names.items()},
            {name: said[key] for name, key in names.items()},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"SPICE failed: {error}. It was written for Java 8, wants 8 GB of memory and writes "
            "beside pycocoevalcap; leave it out of metrics where that cannot be had"
        ) from error
    scores = [float(image["All"]["f"]) for image in images]
    rows = [row if math.isfinite(row) else 0.0 for row in scores]  # nothing to compare: no match
    return sum(rows) / len(rows), rows


_READERS: Mapping[Metric, Callable[[Any, Any, Any], tuple[float, list[float]]]] = {
    "rouge-l": _plain,
    "cider": _plain,
    "bleu-4": _bleu,
    "spice": _spice,
}
