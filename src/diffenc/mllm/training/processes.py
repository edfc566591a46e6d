"""The processes that share a run, under `torchrun` or `accelerate launch`."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import ConfigError
from diffenc.grounding.samples import GroundedImage
from diffenc.mllm.training.data import TrainSample
from diffenc.storage.writing import locked, make_folder


def is_first_process() -> bool:
    """Whether this process writes."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Number of processes that share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str | torch.device | None) -> torch.device:
    """The requested device; without one the process's own GPU, or else the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def of_all(rows: list[Any]) -> tuple[Any, ...]:
    """What all processes of the run have."""
    from accelerate.utils import gather_object

    return tuple(gather_object(rows))


def require_same(samples: Sequence[TrainSample] | Sequence[GroundedImage]) -> None:
    """Raise a `ConfigError` unless all processes train on the same samples."""
    keys = "\0".join(sample.key for sample in samples)
    counts = of_all([(len(samples), hashlib.sha256(keys.encode(errors="replace")).hexdigest())])
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the processes of this run found {[count for count, _ in counts]} usable samples: "
            "they see different files, or some could not be read for a moment. Start again"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others from training in a folder; of several processes the first one does."""
    if not is_first_process():
        yield
        return
    with locked(make_folder(folder), purpose="training in it"):
        yield
