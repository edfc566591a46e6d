"""A callback for transformers' `Trainer` that keeps adapters beside a host's checkpoints."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from diffenc.errors import ConfigError
from diffenc.hosts.installed_towers import towers_of
from diffenc.hosts.tower import DiffusionVisionTower


class AdapterCallback(TrainerCallback):  # type: ignore[misc]  # untyped
    """Writes `diffenc_adapter.safetensors` into every checkpoint, and at the end of training.

    For hosts that leave parameters of the vision tower out of what they save.
    `tower.load_adapter(folder)` reads it. A model with adapters in several towers is refused.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out whether the adapter has a place in a checkpoint."""
        _adapted_tower(kwargs.get("model"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Into the checkpoint that was just written."""
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Into the output folder."""
        self._write(Path(args.output_dir), state, kwargs)

    def _write(self, folder: Path, state: Any, kwargs: dict[str, Any]) -> None:
        tower = _adapted_tower(kwargs.get("model"))
        if tower is not None and state.is_world_process_zero:
            tower.save_adapter(folder)


def _adapted_tower(model: Any) -> DiffusionVisionTower | None:
    """The one tower with an adapter, or None.

    Raises:
        ConfigError: There are several.
    """
    every = () if model is None else towers_of(model)
    towers = [tower for tower in every if tower.adapter is not None]
    if len(towers) > 1:
        specs = ", ".join(str(tower.spec) for tower in towers)
        raise ConfigError(
            f"{len(towers)} towers have an adapter, {specs}, and a checkpoint has a place for one; "
            "leave the rank out of all specs but one, or leave this callback out and call "
            "save_adapter of each tower with a folder of its own"
        )
    return towers[0] if towers else None
