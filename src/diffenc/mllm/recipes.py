"""The paper's trainings as configs and TOML files, all made from the table `recipes.toml`."""

import textwrap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError, near_matches
from diffenc.mllm.training.config import Stage, TrainConfig, to_toml
from diffenc.storage.reading import parse_toml, read_text

_TABLE = "recipes.toml"
_LANGUAGE_MODEL = "lmsys/vicuna-7b-v1.5"
_WIDTH = 98
_HEADER = (
    "{paper}. Paper: Agarwal et al., arXiv:2507.07106. [?] marks what it does not state, and what "
    "stands there instead. What is left out is LLaVA-1.5's. Paths are relative to the folder "
    "where the command runs."
)
_MINIATURE_HEADER = (
    "In miniature, on coloured shapes (diffenc shapes-data shapes-llava): {paper}. Taps, sizes and "
    "token grids are the miniature's own."
)
_MINIATURE_NAMES = {
    "encoder": "shapes",
    "clip": "shapes-clip",
    "language_model": "shapes-lm",
    "template": "chat",
}
_REAL_SIZE = ("taps", "size", "grid")
_MINIATURE_OPTIM = {
    "batch_size": 32,
    "device_batch_size": 32,
    "epochs": 4,
    "precision": "fp32",
    "gradient_checkpointing": False,
}
_MINIATURE_RATE = 5e-4  # LLaVA's 2e-5 is for seven billion parameters
_MINIATURE_RANK = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training of the paper.

    Attributes:
        name: Name of the training, and of its folder in `runs`.
        start: Name of the training whose model it begins with; "" for a first stage.
        paper: Which rows of the paper need it.
        values: Values of the config, nested as in TOML.
        comments: Remarks on single values, by dotted key; "[?]" marks what the paper leaves open.
        header: Remark on the whole.
    """

    name: str
    start: str
    paper: str
    values: Mapping[str, Any]
    comments: Mapping[str, str]
    header: str = _HEADER

    @property
    def stage(self) -> Stage:
        """Stage of the training."""
        stage: Stage = self.values["stage"]
        return stage

    def config(self) -> TrainConfig:
        """The config of the training, checked."""
        return TrainConfig.from_dict(self.values)

    def to_toml(self) -> str:
        """A file for `diffenc train`, with remarks."""
        lines = textwrap.wrap(self.header.format(paper=self.paper), _WIDTH)
        head = "".join(f"# {line}\n" for line in lines)
        return head + to_toml(self.values, comments=self.comments)

    def in_miniature(self) -> "Recipe":
        """The same training on coloured shapes with the bundled models."""
        values = deepcopy(dict(self.values))
        model = values["model"]
        names = {key: name for key, name in _MINIATURE_NAMES.items() if key in model}
        model.update(names, template="chat")
        if model.get("kind") == "vision":
            model["encoder"] = _MINIATURE_NAMES["clip"]
        options = {k: v for k, v in model.get("options", {}).items() if k not in _REAL_SIZE}
        if options:
            model["options"] = options
        values["data"] |= {
            "annotations": f"shapes-llava/{self.stage}.json",
            "images": "shapes-llava/images",
            "max_length": 256,
        }
        del values["data"]["workers"]
        rate = {"learning_rate": _MINIATURE_RATE} if self.stage == "instruct" else {}
        values["optim"] = {**rate, **_MINIATURE_OPTIM}
        if "unet_rank" in values.get("adapt", {}):
            values["adapt"]["unet_rank"] = _MINIATURE_RANK
        return Recipe(self.name, self.start, self.paper, values, {}, _MINIATURE_HEADER)


def recipes() -> dict[str, Recipe]:
    """All trainings by name; each stands behind the one that it begins with."""
    return dict(_recipes())


def recipe(name: str) -> Recipe:
    """A training by name.

    Raises:
        ConfigError: There is none of that name.

    Examples:
        >>> recipe("cross-instruct-s4").start
        'cross-align'
    """
    known = _recipes()
    if name not in known:
        hint = near_matches(name, known)
        raise ConfigError(f"there is no recipe {shown(name)}.{hint} `diffenc recipes` lists them")
    return known[name]


def chain(name: str) -> list[Recipe]:
    """A training behind those that it begins with, in the order in which they run.

    Raises:
        ConfigError: There is none of that name.
    """
    last = recipe(name)
    return [*chain(last.start), last] if last.start else [last]


@cache
def _recipes() -> dict[str, Recipe]:
    path = str(files("diffenc.mllm") / _TABLE)
    table = parse_toml(read_text(path), where=path)
    made: dict[str, Recipe] = {}
    for name, entry in (*table["training"].items(), *_of_features(**table["features"])):
        start = entry.get("start", "")
        encoder = _encoder_of(entry, table["training"])
        made[name] = _recipe(name, start, entry, table["encoders"][encoder], table)
    return made


def _encoder_of(entry: Mapping[str, Any], trainings: Mapping[str, Any]) -> str:
    while "of" not in entry:
        entry = trainings[entry["start"]]
    name: str = entry["of"]
    return name


def _of_features(of: str, places: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Two stages for each place in the U-Net, neither of which has a text."""
    for place in places:
        tap, timestep = place["tap"], place["timestep"]
        first = f"{of}-{tap.lower()}-t{timestep}"
        shared = {
            "of": of,
            "prompts": "empty",
            "options": {"taps": [tap], "timestep": timestep, "conditioning": "uncond"},
        }
        paper = f"{tap} at t = {timestep}: later version, table 1"
        yield f"{first}-align", {**shared, "paper": f"stage 1 of {paper}"}
        yield f"{first}-instruct", {**shared, "start": f"{first}-align", "paper": paper}


def _recipe(
    name: str, start: str, entry: Mapping[str, Any], encoder: Mapping[str, Any], table: Any
) -> Recipe:
    """A training of an entry of the table, its encoder, and what all share."""
    stage = "instruct" if start else "align"
    model = {
        **({"start": f"runs/{start}/model"} if start else {}),
        **deepcopy(encoder["model"]),
        "language_model": _LANGUAGE_MODEL,
        "template": "v1" if start else "plain",
        **({"pad": True} if entry.get("pad") else {}),
    }
    mixing = model.pop("mixing", None)
    if options := {**encoder.get("options", {}), **entry.get("options", {})}:
        model["options"] = options
    if mixing is not None:
        model["mixing"] = mixing
    data = {**table["data"][stage], "prompts": entry.get("prompts", "empty"), "workers": 8}
    values = {"stage": stage, "output": f"runs/{name}", "model": model, "data": data}
    if start:
        rank = {"unet_rank": entry["unet_rank"]} if "unet_rank" in entry else {}
        values["adapt"] = {"language_model": "full", **rank}
    return Recipe(name, start, entry["paper"], values, _comments(values, entry, encoder, table))


def _comments(
    values: Mapping[str, Any], entry: Mapping[str, Any], encoder: Mapping[str, Any], table: Any
) -> dict[str, str]:
    """Remarks on the values that a training has, those of its own entry first."""
    shared = table["comments"]
    remarks = {key: shared[key] for key in ("adapt.language_model", "adapt.unet_rank", "model.pad")}
    if values["stage"] == "align":
        remarks["data.annotations"] = shared["data.annotations.align"]
    if values["data"]["prompts"] == "question":
        remarks["data.prompts"] = shared["data.prompts.question"]
    remarks |= {**encoder.get("comments", {}), **entry.get("comments", {})}
    return {key: text for key, text in remarks.items() if _has(values, key.split("."))}


def _has(values: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True
