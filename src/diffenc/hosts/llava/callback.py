"""A callback for transformers' `Trainer` that keeps adapters beside a host's checkpoints."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from diffenc.hosts.installed_towers import towers_of


class AdapterCallback(TrainerCallback):  # type: ignore[misc]  # untyped
    """Writes `diffenc_adapter.safetensors` into every checkpoint, and at the end of training.

    For hosts that leave parameters of the vision tower out of what they save.
    `tower.load_adapter(folder)` reads it.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Into the checkpoint that was just written."""
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Into the output folder."""
        self._write(Path(args.output_dir), state, kwargs)

    def _write(self, folder: Path, state: Any, kwargs: dict[str, Any]) -> None:
        model = kwargs.get("model")
        if model is None or not state.is_world_process_zero:
            return
        for tower in towers_of(model):
            if tower.adapter is not None:
                tower.save_adapter(folder)
