"""What happens beside the steps: the log, the progress bar, an early end."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from diffenc.errors import NonFiniteError
from diffenc.mllm.training.log import Progress, log_lines
from diffenc.storage.names import is_file
from diffenc.storage.writing import reporting, write_text


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers is seen as Any
    """Writes the log, tells of progress, and stops where the loss is no number.

    Args:
        log: JSON-lines file; lines of steps that are made again are dropped.
        progress: Told steps done, steps in all, and the last loss.
        stop_after: Step at which to stop; None is the end.
    """

    def __init__(
        self,
        log: Path,
        progress: Progress | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.log, self.progress, self.stop_after = log, progress, stop_after
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the log has of the steps before this one."""
        if not state.is_world_process_zero:
            return
        kept: dict[int, dict[str, Any]] = {}
        if state.global_step and is_file(self.log):
            lines, _ = log_lines(self.log)  # what is broken was being written when a run was killed
            kept = {line["step"]: line for line in lines if line["step"] <= state.global_step}
        write_text(self.log, "".join(f"{json.dumps(line)}\n" for line in kept.values()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        logs = dict(logs or {})
        if "loss" not in logs:
            return
        self._loss = float(logs["loss"])
        if not math.isfinite(self._loss):
            raise NonFiniteError(
                f"the loss is {self._loss} at step {state.global_step}; try a lower "
                'optim.learning_rate, or optim.precision = "bf16" or "fp32"'
            )
        if state.is_world_process_zero:
            line = json.dumps({**logs, "step": state.global_step})
            with reporting(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Report progress, and stop after `stop_after` steps."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self._loss)
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True
        return control
