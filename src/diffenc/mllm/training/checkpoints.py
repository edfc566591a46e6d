"""Files of a run, and where it goes on: its newest whole checkpoint."""

from pathlib import Path

from diffenc.errors import BackboneError, ConfigError
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.model_folder import is_saved
from diffenc.mllm.training.grounded import GroundedEncoder
from diffenc.mllm.training.sharding import set_trained
from diffenc.models.encoder_folder import CONFIG_FILE as ENCODER_FILE
from diffenc.storage.names import is_file, is_folder
from diffenc.storage.reading import read_json
from diffenc.storage.tensors import misfits, read_tensors

MODEL_FOLDER, CONFIG_FILE = "model", "config.toml"
LEFT_OUT_FILE = "left_out.json"
"""Name of the file that lists the records left out when the run began; resuming leaves out the same
ones."""
WEIGHTS_FILE, RUN_FILE, STATE_FILE = "trained.safetensors", "run.json", "trainer_state.json"


def starting_point(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from; None where it begins.

    Raises:
        ConfigError: The folder holds a run that shall not be resumed, or a complete one.
    """
    complete = is_saved(folder / MODEL_FOLDER) or is_file(folder / MODEL_FOLDER / ENCODER_FILE)
    if resume:
        if complete:
            raise ConfigError(
                f"{folder / MODEL_FOLDER} is complete: there is nothing to resume. To train again, "
                "choose another output or remove the folder"
            )
        return find_checkpoint(folder)
    if is_folder(folder) and (complete or any(folder.glob("checkpoint-*"))):
        raise ConfigError(
            f"{folder} holds a run already; go on with it (--resume), choose another output, or "
            "remove the folder"
        )
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; one whose writing was interrupted does not count."""
    checkpoints = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_whole(path)
    ]
    return max(checkpoints)[1] if checkpoints else None


def step_of(checkpoint: Path | None) -> int:
    """Number of steps that were done when a checkpoint was written."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def read_left_out(folder: Path) -> frozenset[int] | None:
    """Records that the run in a folder began without, None where it does not say."""
    if not is_file(folder / LEFT_OUT_FILE):
        return None
    return frozenset(read_json(folder / LEFT_OUT_FILE, list))


def load_trained(vlm: "DiffusionVLM | GroundedEncoder", checkpoint: Path) -> None:
    """Set what trains to what a checkpoint holds.

    Raises:
        BackboneError: It cannot be read, or holds other parameters.
    """
    state = read_tensors(checkpoint / WEIGHTS_FILE, error=BackboneError, finite=True)
    own = dict(vlm.named_trainable_parameters())
    if wrong := misfits(state, own):
        raise BackboneError(
            f"{checkpoint} is a checkpoint of another model: {len(wrong)} parameters differ, such "
            f"as {wrong[0]!r}"
        )
    set_trained(vlm, state)


def _is_whole(checkpoint: Path) -> bool:
    """The state is written last."""
    try:
        state = read_json(checkpoint / STATE_FILE, finite=False)
    except ConfigError:
        return False
    whole = is_file(checkpoint / WEIGHTS_FILE) and is_file(checkpoint / RUN_FILE)
    return whole and state.get("global_step") == step_of(checkpoint)
