"""Which vision-language classes of transformers take a tower of diffenc: each is tried, tiny.

    python tools/transformers_hosts.py > docs/results/transformers-hosts.md

A class is given a `DiffEncConfig` as its `vision_config` and a language model of one layer. It is
built, asked for the features of a picture, and run on a text with that picture, under two questions
(`prompt_scope`) and with another picture. "yes" says that the last word's logits differ for both;
"not run" that something else than the tower stopped it, at these tiny sizes.
"""

import copy
import inspect
import re
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from diffenc.hosts.prompts import prompt_scope
from diffenc.hosts.transformers import DiffEncConfig, DiffEncModel

SPEC = "diffenc:shapes?t=50"
QUESTIONS = ("what color is the circle?", "how many stars are there?")
TOKENS = 64  # of a picture, before a class joins some
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SETTINGS: dict[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "image_grid_pinpoints": [[64, 64]],
    "projection_dim": SMALL["hidden_size"],
}
# What classes ask for that cut pictures before the tower.
PATCHES = {"image_grid_thw", "spatial_shapes", "image_merge_sizes"}
SIZES = torch.tensor([[64, 64]])


HEAD = """# Vision-language classes of transformers

Every class that `AutoModelForImageTextToText` of transformers {version} knows, tried with a
`DiffEncConfig` as `vision_config` and a language model of one layer, on a CPU, by
`python tools/transformers_hosts.py`. {yes} work: features of the tower reach the language model,
and the last word's logits differ with the picture and with the question (`prompt_scope`).
"not run": something else than the tower stopped it, at these sizes. See
[In which host](../guides/hosts.md).

| class | works | tower and tokens of a picture of 64 x 64, or what stops it |
|---|---|---|
"""


def tiny_config(kind: str) -> Any:
    config = configuration_auto.CONFIG_MAPPING[kind](vision_config=DiffEncConfig(SPEC))
    text: Any = getattr(config, "text_config", None)
    for name, value in SMALL.items():
        if hasattr(text, name):
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"]
    named = getattr(config, "image_token_id", None)
    token = int(getattr(config, "image_token_index", 0) if named is None else named)
    text.vocab_size = max(getattr(text, "vocab_size", 0), token + 1)
    for name, setting in SETTINGS.items():
        for part in (config, config.vision_config):
            if hasattr(part, name):
                setattr(part, name, setting)
    return config


def comes_back(kind: str) -> bool:
    """Whether a saved config still names the tower."""
    config = configuration_auto.CONFIG_MAPPING[kind](vision_config=DiffEncConfig(SPEC))
    again = type(config).from_dict(config.to_dict())
    return isinstance(again.vision_config, DiffEncConfig)


def rows_of(features: Any) -> torch.Tensor:
    """Features of one picture as rows, in whichever form a class gives them."""
    value = getattr(features, "pooler_output", features)
    while isinstance(value, (list, tuple)):
        value = value[0]
    rows: torch.Tensor = value.reshape(-1, value.shape[-1])
    return rows


def attempt(cls: Any, kind: str) -> tuple[str, str]:
    """How far a class comes, and what stopped it."""
    try:
        config = tiny_config(kind)
        if not isinstance(config.vision_config, DiffEncConfig):
            return "no", f"its config replaces the tower's by a {type(config.vision_config)}"
        model = cls(copy.deepcopy(config)).eval()
    except Exception as error:
        ours = isinstance(error, AttributeError) and "DiffEncConfig" in str(error)
        return "no" if ours or "field 'vision_config'" in str(error) else "not run", said(error)
    names = [n for n, part in model.named_modules() if isinstance(part, DiffEncModel)]
    if not names:
        return "no", "it builds another tower"
    try:
        return answers(model, config, names[0])
    except Exception as error:
        return "not run", said(error)


@torch.no_grad()
def answers(model: Any, config: Any, place: str) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    owner = model if hasattr(model, "get_image_features") else model.model
    parameters = inspect.signature(owner.get_image_features).parameters
    if PATCHES & set(parameters):
        return "no", "hands its tower patches and their grid, not pictures"
    call = {"image_sizes": SIZES} if "image_sizes" in parameters else {}
    tiled = hasattr(config, "image_grid_pinpoints")
    shown = [
        each[None, None].expand(1, 2, -1, -1, -1) if tiled else each[None] for each in pictures
    ]
    features = rows_of(owner.get_image_features(shown[0], **call))
    token = getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.tensor([[1, *[token] * len(features), 5, 6]])
    call["attention_mask"] = torch.ones_like(ids)

    def logits(picture: torch.Tensor, question: str) -> torch.Tensor:
        with prompt_scope(question):
            answer: torch.Tensor = model(input_ids=ids, pixel_values=picture, **call).logits[0, -1]
        return answer

    first, other, another = (
        logits(shown[0], QUESTIONS[0]),
        logits(shown[0], QUESTIONS[1]),
        logits(shown[1], QUESTIONS[0]),
    )
    if not torch.isfinite(first).all() or torch.equal(first, another):
        return "no", "its answer does not depend on the picture"
    if torch.equal(first, other):
        return "pictures", f"`{place}`; the question does not arrive"
    lost = "; the first is dropped as a class token" if len(features) == TOKENS - 1 else ""
    return "yes", f"`{place}`; {len(features)} tokens{lost}"


def said(error: Exception) -> str:
    """The reason in one line."""
    text = " ".join(str(error).split())
    if "Validation error for field 'vision_config'" in text:
        return "its config takes no other class as vision_config"
    if missing := re.search(r"'DiffEncConfig' object has no attribute '(\w+)'", text):
        return f"reads `{missing[1]}` of its own tower's config"
    text = text.split(". ")[0]
    return f"{type(error).__name__}: {text[:110]}".replace("|", "/")


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    table: dict[str, tuple[str, str]] = {}
    for kind, name in names.items():
        subs = getattr(configuration_auto.CONFIG_MAPPING[kind], "sub_configs", {})
        if "vision_config" not in subs:
            result = ("no", "has no vision_config")
        else:
            torch.manual_seed(0)
            result = attempt(getattr(transformers, name), kind)
            if result[0] in ("yes", "pictures") and not comes_back(kind):
                result = (result[0], f"{result[1]}; a saved one comes back with its own tower")
        if name not in table or table[name][0] != "yes":
            table[name] = result
    counts = Counter(works for works, _ in table.values())
    sys.stdout.write(HEAD.format(version=transformers.__version__, **dict(counts)))
    order = {"yes": 0, "pictures": 1, "no": 2, "not run": 3}
    for name, (works, why) in sorted(table.items(), key=lambda row: (order[row[1][0]], row[0])):
        sys.stdout.write(f"| `{name}` | {works} | {why} |\n")


if __name__ == "__main__":
    main()
