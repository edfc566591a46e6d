"""What a run and its continuation must share: settings, samples, and the models' weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.grounding.samples import GroundedImage
from diffenc.memory.digests import is_marked, weights_mark
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.training.checkpoints import RUN_FILE
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import TrainSample
from diffenc.mllm.training.grounded import GroundedEncoder
from diffenc.storage.reading import parse_json, read_json

Samples = Sequence[TrainSample] | Sequence[GroundedImage]
"""What a run learns from."""

# What may change between a run and its continuation.
_FREE = ("output", "save_steps", "keep", "log_steps")
_FREE_DATA = (
    *("workers", "cache", "cache_gb", "cache_dir", "images", "annotations"),
    *("skip_broken", "check_images"),
)
_FREE_OPTIM = ("device_batch_size", "shard")


def run_identity(
    lasting: TrainConfig,
    samples: Samples,
    images: Path,
    phrases: Sequence[GroundedImage] = (),
) -> dict[str, Any]:
    """What a run and its continuation must share, flat; `weights` comes with the model.

    Args:
        lasting: Config of the run, with absolute paths.
        samples: Usable samples.
        images: Folder to which the samples' pictures are relative.
        phrases: Phrases that are learnt beside conversations.
    """
    settings = {key: value for key, value in lasting.to_dict().items() if key not in _FREE}
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in _FREE_DATA}
    if "ground" in settings:
        settings["ground"] = {k: v for k, v in settings["ground"].items() if k not in _FREE_DATA}
    settings["optim"] = {k: v for k, v in settings["optim"].items() if k not in _FREE_OPTIM}
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flat[key] = value
    content = _content_of(samples, images)
    identity = {**flat, "samples": len(samples), "content of the samples": content}
    if phrases:
        identity["content of the phrases"] = _content_of(phrases, phrases[0].image.parent)
    if not lasting.data.skip_broken:  # a picture that is gone since then is left out
        identity["sizes of the pictures"] = _sizes_of(samples)
    return identity


def marks_of(vlm: "DiffusionVLM | GroundedEncoder") -> dict[str, Any]:
    """Marks of the weights that a run begins with, by part."""
    return {part: weights_mark(module) for part, module in _parts(vlm).items()}


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise unless a checkpoint is of this run.

    Raises:
        ConfigError: Something that it was trained with is another now; all of it is named.
            The weights are compared by `check_same_weights`.
    """
    try:
        before = read_json(checkpoint / RUN_FILE)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint} does not say what it was trained with: {error}") from error
    now = parse_json(json.dumps(identity), where="this run")
    if not ("sizes of the pictures" in before and "sizes of the pictures" in now):
        before.pop("sizes of the pictures", None), now.pop("sizes of the pictures", None)
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted((before.keys() | now.keys()) - {"weights"})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} is of another configuration: {'; '.join(changed)}. Go on with the one "
            "it was begun with, or choose another output"
        )


def check_same_weights(checkpoint: Path, vlm: "DiffusionVLM | GroundedEncoder") -> None:
    """Raise unless the models of a run are those that its checkpoint was begun with.

    Raises:
        ConfigError: A model of the same name has other weights now.
    """
    before = read_json(checkpoint / RUN_FILE).get("weights", {})
    parts = _parts(vlm)
    for part, mark in before.items():
        if part in parts and not is_marked(parts[part], mark):
            raise ConfigError(
                f"{checkpoint} was trained with another {part}: the one that stands in its place "
                "has other weights. Put that one back, or choose another output"
            )


def _parts(vlm: "DiffusionVLM | GroundedEncoder") -> dict[str, Any]:
    language = {"language model": vlm.language_model} if isinstance(vlm, DiffusionVLM) else {}
    return {"encoder": vlm.encoder, **language}


def _content_of(samples: Samples, images: Path) -> str:
    """Digest of texts, and of the names of pictures in their folder."""
    digest = hashlib.blake2b(digest_size=12)
    for sample in samples:
        names = [os.path.relpath(path, images) for path in sample.images]
        first, *others = sample.content()
        digest.update(json.dumps([first, names, *others]).encode())
    return digest.hexdigest()


def _sizes_of(samples: Samples) -> str:
    """Digest of how large the pictures' files are."""
    sizes = [path.stat().st_size for sample in samples for path in sample.images]
    return hashlib.blake2b(json.dumps(sizes).encode(), digest_size=12).hexdigest()
