"""Pictures and metrics of `diffenc evaluate captions` and `leakage`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffenc.cli.evaluate_answers_run import refuse
from diffenc.cli.score_options import split_names

if TYPE_CHECKING:
    from diffenc.evals.captioning import CaptionSet

_TOKENS = 64
_SHAPES_TOKENS = 32


def read_captions(
    data: str,
    annotations: Path | None,
    split: str | None,
    limit: int | None,
    data_seed: int | None,
) -> "CaptionSet":
    """The pictures that the command line asks for.

    Raises:
        ConfigError: There are none, or an option does not go with them.
    """
    from diffenc.evals.captioning import load_coco, shapes_captions
    from diffenc.evals.captioning.miniature import CAPTIONS_SEED

    if data == "shapes":
        refuse("COCO's files, not to --data shapes", annotations=annotations, split=split)
        scenes = CAPTIONS_SEED if data_seed is None else data_seed
        return (
            shapes_captions(seed=scenes) if limit is None else shapes_captions(limit, seed=scenes)
        )
    refuse("--data shapes", data_seed=data_seed)
    return load_coco(data, annotations=annotations, split=split or "test").select(limit=limit)


def known_metrics(entries: list[str] | None, tokenizer: str) -> Any:
    """Names of metrics that can run here.

    Raises:
        ConfigError: One is unknown, stands twice, or lacks Java.
        MissingExtraError: pycocoevalcap is not installed.
    """
    from diffenc.config import check_choice
    from diffenc.evals.captioning.metrics import require_metrics

    check_choice("tokenizer", tokenizer, ("ptb", "simple"))
    metrics: Any = split_names(entries) or ()
    require_metrics(metrics, tokenizer)  # type: ignore[arg-type]  # checked above
    return metrics


def caption_tokens(data: str) -> int:
    """Most tokens of a caption, by default."""
    return _SHAPES_TOKENS if data == "shapes" else _TOKENS
