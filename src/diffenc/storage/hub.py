"""Files of the Hugging Face Hub: what a repository lists, and a local folder with some of them."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

_CONVERTER = "SFconvertbot"
"""Account of the Hub that offers `.safetensors` of models whose owners wrote other formats."""


def hub_folder(
    hub_id: str,
    small: Callable[[str], bool],
    weights: Callable[[Path, Sequence[str]], Iterable[str]] | None = None,
    *,
    revision: str | None = None,
) -> Path:
    """A local folder with files of a repository, fetched into the Hub's cache where needed.

    Without network, or where the repository does not answer, it is what the cache has.

    Args:
        hub_id: Id of the repository, such as "owner/name".
        small: Function that says by its path whether a file is always needed, such as configs and
            indexes of weights.
        weights: Function that returns the other files that are needed, given the folder with the
            small files and the paths of all files of the repository; None needs no others.
        revision: Branch, tag or commit to read; None is the main branch.

    Raises:
        Exception: The Hub's own, where the repository is neither there nor in the cache.
    """
    import huggingface_hub

    try:
        listing = list_files(hub_id, revision=revision)
    except Exception as offline:  # no network, gated, gone: the cache may have it all the same
        try:
            cached = huggingface_hub.snapshot_download(
                hub_id, revision=revision, local_files_only=True
            )
            return Path(cached)
        except Exception:
            raise offline from None
    needed = [name for name in listing if small(name)]
    folder = _fetch(hub_id, needed, revision)
    if weights is not None and (more := list(weights(folder, listing))):
        folder = _fetch(hub_id, [*needed, *more], revision)
    return folder


def list_files(hub_id: str, *, revision: str | None = None) -> list[str]:
    """Paths of the files of a repository.

    Raises:
        Exception: The Hub's own, where it does not answer.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(hub_id, revision=revision)
    return sorted(entry.rfilename for entry in info.siblings or ())


def converted_revision(hub_id: str) -> str | None:
    """The pull request in which the Hub offers a model's weights as `.safetensors`, or None."""
    from huggingface_hub import HfApi

    try:
        requests = HfApi().get_repo_discussions(
            hub_id, author=_CONVERTER, discussion_type="pull_request", discussion_status="open"
        )
        return next((each.git_reference for each in requests), None)
    except Exception:  # there is none that can be had
        return None


def cached_conversion(hub_id: str, pattern: str) -> Path | None:
    """The folder of a pull request in the Hub's cache that has files of a pattern, or None."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    try:
        for reference in sorted((root / "refs" / "refs" / "pr").iterdir()):
            folder = root / "snapshots" / reference.read_text(encoding="utf-8").strip()
            if next(folder.glob(pattern), None) is not None:
                return folder
    except (OSError, ValueError):
        pass
    return None


def _fetch(hub_id: str, names: Sequence[str], revision: str | None) -> Path:
    import huggingface_hub

    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    folder: Any = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, **options)
    return Path(folder)
