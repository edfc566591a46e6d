"""Models of transformers, all of whose weights are there and fit."""

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError
from diffenc.storage.names import is_file
from diffenc.storage.weights import (
    HALF,
    TRANSFORMERS,
    StoredWeights,
    check_finite,
    open_weights,
)

_HALVES = ("text_model", "text_projection", "vision_model", "visual_projection", "logit_")
_COUNTED = ("position_ids", "inv_freq", ".attn.bias", ".attn.masked_bias", "num_batches_tracked")
"""Endings of the names of values that models make themselves, and that some files also hold."""


def load_from(
    kind: Any, folder: Path, *, dtype: torch.dtype = torch.float32, unread: Sequence[str] = ()
) -> Any:
    """A model of transformers, all of whose weights are there.

    What else the file holds is passed over in silence where it is another part of the same model: a
    vision tower is a part of its CLIP. All other weights must have a place in the model.

    Args:
        kind: Class of transformers to load, or one of its `Auto` classes.
        folder: Folder that holds the model.
        dtype: Floating point type of the weights.
        unread: Beginnings of the names of weights that are not used and may be missing; they are 0
            then.

    Raises:
        BackboneError: Weights are missing, which transformers would draw at random, or unknown, of
            another shape, no floating numbers, NaN or infinite.
        Exception: The libraries' own, where they cannot build such a model.
    """
    weights, variant = open_weights(folder, TRANSFORMERS, half=dtype == torch.float16)
    if variant == HALF and dtype == torch.float32:
        warnings.warn(
            f"{folder} has its weights in half precision alone: they are rounded to float16, "
            "whatever they are computed in",
            stacklevel=2,
        )
    # transformers 4 draws some weights at random before it reads them.
    with _quiet(), torch.random.fork_rng(devices=[]):
        config, kind = _described(kind, folder)
        _check_stored(kind, config, weights)
        # Sizes that differ are told by their names and refused below; nothing goes on with them.
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **{dtype_argument(): dtype},
        )
        _check_report(kind, model, weights, report, tuple(unread))
        if is_file(folder / "generation_config.json") and hasattr(model, "generation_config"):
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def dtype_argument() -> str:
    """Name of the argument for the type of weights, which transformers renamed in 4.56."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log and the progress bars of transformers while it loads.

    Its verbosity is that of the whole process, so the log is filtered in this thread. Bars have a
    switch alone: it is set back where the program had them on.
    """
    from transformers.utils import logging as library

    library.get_logger()  # sets up the handlers, if nothing did yet
    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    owner = threading.get_ident()

    def shown(record: logging.LogRecord) -> bool:
        ours = record.thread == owner and record.name.partition(".")[0] == "transformers"
        return not ours or record.levelno >= logging.ERROR

    handlers = [*logging.getLogger("transformers").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(shown)
    try:
        yield
    finally:
        if bars:
            library.enable_progress_bar()
        for handler in handlers:
            handler.removeFilter(shown)


def _described(kind: Any, folder: Path) -> tuple[Any, Any]:
    """Config and class of a model; of an `Auto` class, the one that it leads to."""
    from transformers import AutoConfig

    if kind.__name__.startswith("Auto"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return config, type(kind.from_config(config, trust_remote_code=False))
    return kind.config_class.from_pretrained(folder, local_files_only=True), kind


def _check_stored(kind: Any, config: Any, weights: StoredWeights) -> None:
    """Raise where the files cannot be of this model, before anything is allocated for it."""
    if getattr(config, "quantization_config", None) is not None:
        return
    for name in weights:
        if name.endswith(".weight") and not weights.dtype(name).startswith(("F", "BF")):
            raise BackboneError(
                f"{weights.where} holds whole numbers for {name!r}; diffenc reads weights in "
                "floating point"
            )
    with torch.device("meta"):
        model = kind(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(torch.Size(weights.shape(name)).numel() for name in weights)
    if expected > 2 * stored + 2**20:
        raise BackboneError(
            f"{weights.where} holds no whole {kind.__name__}: its config describes {expected:,} "
            f"numbers, and its files hold {stored:,}"
        )


def _check_report(
    kind: Any, model: Any, weights: StoredWeights, report: Any, unread: tuple[str, ...]
) -> None:
    """Raise for what transformers says of the weights that it took."""
    where = f"{weights.where} holds no whole {kind.__name__}"
    if mismatched := sorted(report["mismatched_keys"]):
        entry = mismatched[0]
        if isinstance(entry, str):  # transformers 4 says no more than the name
            raise BackboneError(f"{where}: {entry!r} has another shape there than by its config")
        name, stored, needed = entry
        raise BackboneError(
            f"{where}: {name!r} is {tuple(stored)}, and by its config {tuple(needed)}"
        )
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # Before transformers 5, a model that is read out of one with a head is told by the names there.
    prefix = f"{kind.base_model_prefix}."
    missing = {
        name if name in values else name.removeprefix(prefix) for name in report["missing_keys"]
    }
    for name in [name for name in missing if unread and name.startswith(unread)]:
        missing.remove(name)
        values[name].data.zero_()
    for verb, names in (
        ("it lacks", sorted(missing)),
        ("its config has no place for", _strange(kind, model, weights, report)),
    ):
        if names:
            more = f" and {len(names) - 1} more of its weights" if len(names) > 1 else ""
            raise BackboneError(
                f"{where}: {verb} {names[0]!r}{more}; pass a model that has all of them, and a "
                "config that is its own"
            )
    if report.get("error_msgs"):
        raise BackboneError(f"{where}: {report['error_msgs'][0]}")
    for name, value in values.items():
        if value.is_meta:
            raise BackboneError(f"{where}: it lacks {name!r}")
        check_finite(value, name, weights.where)


def _strange(kind: Any, model: Any, weights: StoredWeights, report: Any) -> list[str]:
    """Weights of the files that belong neither to the model nor to another part of its whole."""
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(_COUNTED)]
    if kind.__name__.startswith(("CLIP", "Siglip")):
        others = tuple(half for half in _HALVES if not _owns(kind, half))
        return sorted(name for name in unexpected if not (others and name.startswith(others)))
    prefix = f"{kind.base_model_prefix}."
    if not hasattr(model, kind.base_model_prefix) and any(n.startswith(prefix) for n in weights):
        # A model without its head is read from one with a head.
        return sorted(name for name in unexpected if name.startswith(prefix))
    return sorted(unexpected)


def _owns(kind: Any, half: str) -> bool:
    if "Vision" not in kind.__name__:
        return True
    projects = half == "visual_projection" and kind.__name__.endswith("WithProjection")
    return half == "vision_model" or projects
