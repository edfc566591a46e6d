"""Trainings of studies in a folder: each is done once, goes on after a kill, and is shared.

What a training is, is said by a digest of everything that its result depends on. Studies that need
the same training find it, whatever they call it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from diffenc._version import __version__
from diffenc.errors import BackboneError, ConfigError
from diffenc.mllm.language import load_language_model
from diffenc.mllm.model_folder import is_saved
from diffenc.mllm.training.checkpoints import MODEL_FOLDER
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.miniature import EDITIONS, write_miniature
from diffenc.mllm.training.stages import train
from diffenc.mllm.vision import VisionTokens
from diffenc.storage.names import is_folder
from diffenc.storage.pretrained import model_config
from diffenc.storage.reading import DATA_BYTES, read_bytes, read_json
from diffenc.storage.writing import locked, make_folder, remove_folder, reporting, write_json
from diffenc.studies.vlm.measure import CROWD_SIDE, SIDE
from diffenc.studies.vlm.plan import StudyData, StudyPlan

_WHAT_FILE = "what.json"
_TOKENS = "tokens"
# What a result does not depend on.
_FREE = ("output", "save_steps", "keep", "log_steps")
_FREE_TABLES = {
    "data": ("annotations", "images", "cache", "cache_dir", "cache_gb", "workers"),
    "optim": ("shard",),
}

Step = Callable[[int, int], None]
"""Function that is called with the number of steps that are done and the number of all steps."""


class Workshop:
    """The work folder of a study.

    Args:
        plan: Plan that names the trainings.
        folder: Folder of the work, which is created if it is missing; several studies may share it.
        device: Device that the models run on; None is CUDA if there is one, otherwise the CPU.

    Attributes:
        fresh: Trainings that were done, or finished, by this object.

    Raises:
        OutputError: The folder cannot be made.
    """

    def __init__(
        self,
        plan: StudyPlan,
        folder: "str | os.PathLike[str]",
        *,
        device: str | torch.device | None = None,
    ) -> None:
        self.plan, self.folder, self.device = plan, Path(folder), device
        self.fresh: list[str] = []
        self._prints: dict[str, str] = {}
        make_folder(self.folder)

    def data(self) -> dict[str, Path]:
        """Pictures and conversations, written once.

        Raises:
            OutputError: The folder cannot be written.
        """
        data = self.plan.data
        edition = ".".join(map(str, EDITIONS.values()))
        other = "".join(f"-{name}-{value}" for name, value in self._other_data().items())
        name = f"shapes-{data.scenes}-{data.seed}-{data.turns}-{edition}{other}"
        target = self.folder / name
        with locked(self.folder, purpose="writing the data", wait=True, name=target.name):
            if not is_folder(target):
                partial = self.folder / f".{target.name}.partial"  # of one that was killed
                remove_folder(partial)
                write_miniature(
                    partial,
                    scenes=data.scenes,
                    seed=data.seed,
                    turns=data.turns,
                    lettered=data.lettered,
                    size=CROWD_SIDE if data.crowds else SIDE,
                    crowds=data.crowds,
                )
                with reporting(target):
                    partial.rename(target)
        annotations = {name: target / f"{name}.json" for name in EDITIONS}
        return {**annotations, "images": target / "images"}

    def _other_data(self) -> dict[str, Any]:
        """Options of the data that are not as usual."""
        data, usual = asdict(self.plan.data), asdict(StudyData())
        return {name: data[name] for name in ("lettered", "crowds") if data[name] != usual[name]}

    def identity(self, name: str, seed: int) -> str:
        """Digest of a training with a seed: equal for equal results, wherever files lie."""
        training, data = self.plan.trainings[name], self.plan.data
        config = self.plan.config(name, seed=seed)
        return digest_of(
            {
                "version": __version__,
                "config": _deciding(config),
                "scenes": [data.scenes, data.seed, data.turns],
                **self._other_data(),
                "learns from": f"{training.learns_from} {EDITIONS[training.learns_from]}",
                "start": self.identity(training.start, seed) if training.start else "",
                "parts": {part: self._fingerprint(part) for part in self._parts(name)},
            }
        )

    def trained(self, name: str, seed: int, *, progress: Step | None = None) -> Path:
        """Folder of the trained model, which `DiffusionVLM.from_pretrained` reads.

        Args:
            name: Name of the training; those it starts from are done first.
            seed: Seed, the number of the repetition from 0.
            progress: Function that is called with the number of steps that are done and the number
                of all steps; None reports nothing.

        Raises:
            BackboneError: A part is missing.
            ConfigError: The configuration cannot be run.
            OutputError: The folder cannot be written.
        """
        training = self.plan.trainings[name]
        start = self.trained(training.start, seed) if training.start else ""
        folder = self.folder_of(name, seed)
        with locked(make_folder(folder), purpose="training this", wait=True, name=MODEL_FOLDER):
            if not is_saved(folder / MODEL_FOLDER):
                self._train(name, seed, folder, start, progress)
            for checkpoint in folder.glob("checkpoint-*"):  # of no use beside the model
                shutil.rmtree(checkpoint, ignore_errors=True)
        return folder / MODEL_FOLDER

    def _train(
        self, name: str, seed: int, folder: Path, start: "str | Path", progress: Step | None
    ) -> None:
        def report(done: int, total: int, _loss: float | None) -> None:
            if progress is not None:
                progress(done, total)

        config = self.config(name, seed, output=folder, start=start)
        train(config, resume=True, device=self.device, progress=report)
        content = {"study": self.plan.name, "training": name, "seed": seed}
        write_json(folder / _WHAT_FILE, content)
        self.fresh.append(f"{name}, seed {seed}")

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether a training is done."""
        return is_saved(self.folder_of(name, seed) / MODEL_FOLDER)

    def count_trained(self) -> int:
        """Number of trainings that are done, each seed counted."""
        return sum(
            self.is_trained(name, seed)
            for name in self.plan.trainings
            for seed in range(self.plan.seeds)
        )

    def folder_of(self, name: str, seed: int) -> Path:
        """Folder of a run."""
        stage = self.plan.trainings[name].stage
        return self.folder / "trainings" / f"{stage}-{self.identity(name, seed)}"

    def config(
        self, name: str, seed: int, *, output: "str | Path" = "any", start: "str | Path" = "any"
    ) -> TrainConfig:
        """Configuration of a training for `diffenc.mllm.training`; writes the data.

        Args:
            name: Name of the training.
            seed: Seed, the number of the repetition from 0.
            output: Folder of the run.
            start: Folder of the model that the training starts from, if it starts from one.
        """
        return self.plan.config(
            name,
            files=self.data(),
            output=output,
            seed=seed,
            start=start,
            cache_dir=self.folder / _TOKENS,
        )

    def missing(self) -> dict[str, str]:
        """Trainings that cannot be done here, with the reason: a CLIP that is not there.

        Raises:
            BackboneError: There is no such language model.
        """
        plan = self.plan
        roots = [name for name, training in plan.trainings.items() if not training.start]
        for language_model in {plan.config(name).model.language_model for name in roots}:
            _require_language_model(language_model)
        missing: dict[str, str] = {}
        reasons: dict[str, str] = {}
        for name, training in plan.trainings.items():
            if training.start in missing:
                missing[name] = missing[training.start]
                continue
            for part in self._vision_parts(name):
                if part not in reasons:
                    reasons[part] = _why_missing(part)
                if reasons[part]:
                    missing[name] = reasons[part]
        return missing

    def _vision_parts(self, name: str) -> list[str]:
        model = self.plan.model(name)
        own = [model["encoder"]] if model.get("kind") == "vision" else []
        return [*own, *filter(None, (model.get("clip"), model.get("captioner")))]

    def _parts(self, name: str) -> list[str]:
        """Names of the models that a training is made of."""
        model = self.plan.config(name).model
        parts = {model.encoder, model.clip, model.captioner}
        if not self.plan.trainings[name].start:
            parts.add(model.language_model)
        return sorted(filter(None, parts))

    def _fingerprint(self, part: str) -> str:
        if part not in self._prints:
            self._prints[part] = fingerprint(part)
        return self._prints[part]


def trained_models(
    folder: "str | os.PathLike[str]", training: str | None = None
) -> dict[str, Path]:
    """Folders of the models in a work folder that answer questions, by training and seed.

    Args:
        folder: Work folder of studies.
        training: Name of the training; None takes every second stage.

    Raises:
        ConfigError: There is none.
    """
    models: dict[tuple[str, int], Path] = {}
    for each in sorted(Path(folder).glob(f"trainings/instruct-*/{_WHAT_FILE}")):
        what = read_json(each)
        if is_saved(each.parent / MODEL_FOLDER):
            key = str(what.get("training")), int(what.get("seed", 0))
            models[key] = each.parent / MODEL_FOLDER
    known = sorted({name for name, _ in models})
    chosen = {key: models[key] for key in sorted(models) if training in (None, key[0])}
    if not chosen:
        there = f"it has those of {known}" if known else "it has none"
        named = "" if training is None else f" of the training {training!r}"
        raise ConfigError(
            f"{folder} has no trained model{named} that answers questions; {there}. "
            "`diffenc study conditioning --work FOLDER` trains some"
        )
    return {f"{name}, seed {seed}": path for (name, seed), path in chosen.items()}


def fingerprint(name: str) -> str:
    """Digest of a model's files if it is a folder or bundled, otherwise its name."""
    bundled = Path(str(files("diffenc.models") / "assets" / name))
    folder = next((path for path in (Path(name), bundled) if is_folder(path)), None)
    if folder is None:
        return name
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(read_bytes(path, most=DATA_BYTES, error=BackboneError))
    return digest.hexdigest()


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides over the result, as far as it is not as usual.

    An option that is new, and by default does what was done before, makes no training another.
    """
    plain = {key: value for key, value in _unusual(config).items() if key not in _FREE}
    for table, free in _FREE_TABLES.items():
        plain[table] = {k: v for k, v in plain[table].items() if k not in free}
    return plain


def _unusual(options: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, nested ones alike."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    usual = {each.name: each.default for each in fields(options)}
    return {
        name: _unusual(value) if is_dataclass(value) else value
        for name, value in values.items()
        if is_dataclass(value) or value != usual[name]
    }


def digest_of(value: Mapping[str, Any]) -> str:
    """Digest of any value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _require_language_model(name: str) -> None:
    """Find out before anything runs, and without its weights.

    Raises:
        BackboneError: There is none of that name.
    """
    try:
        model_config(name)
    except (OSError, ValueError):
        load_language_model(name)  # says why


def _why_missing(part: str) -> str:
    """Empty where a vision model is there."""
    try:
        VisionTokens.from_pretrained(part)
    except (BackboneError, ConfigError) as error:
        return str(error)
    return ""
