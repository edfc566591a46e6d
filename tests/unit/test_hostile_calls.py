"""Public calls with values of every kind: they work, or raise an error of diffenc in a sentence."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import (
    CrossAttnScorer,
    DiffencError,
    DiffusionEncoder,
    DiffusionVLM,
    FusedEncoder,
    FusedProjector,
    Projector,
    QueryBank,
    list_taps,
    load_backbone,
    projector_for,
)
from diffenc.models import match_taps

IMAGE = Image.new("RGB", (64, 64), "red")
VALUES = [
    None,
    0,
    -1,
    2**70,
    0.5,
    float("nan"),
    True,
    "",
    "x",
    "\ud800",
    b"x",
    [],
    {},
    {"a": 1},
    set(),
    ["a"],
    [None],
    [[["a"]]],
    object(),
    torch.zeros(2),
    torch.tensor(3),
    np.int64(3),
    np.array(["a"]),
    np.zeros((2, 2)),
    IMAGE,
    range(3),
    complex(1, 2),
    slice(1),
    "a" * 5000,
]


def names_of_no_model(folder: Path) -> list[Any]:
    (folder / "only").mkdir()
    (folder / "only" / "config.json").write_text("{}")
    (folder / "file.txt").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    return [
        *(value for value in VALUES if value is not None),
        "\0",
        "a/\ud800",
        "~nobody/x",
        "a/b/c",
        "owner/na me",
        "shapes ",
        Path("x" * 300),
        Path("\0"),
        folder,
        folder / "only",
        folder / "file.txt",
        folder / "file.txt" / "inner",
        folder / "loop",
        folder / "none.safetensors",
        folder / "none.ckpt",
    ]


def foreign(calls: dict[str, Callable[[Any], Any]], values: Iterable[Any]) -> list[str]:
    """What came out of calls that is neither a result nor a sentence of diffenc."""
    found = []
    for value in values:
        for name, call in calls.items():
            shown = f"{name}({value!a:.40})"
            try:
                call(value)
            except DiffencError as error:
                if not str(error).strip() or len(str(error)) > 12_000:
                    found.append(f"{shown}: {len(str(error))} characters")
            except Exception as error:
                found.append(f"{shown}: {type(error).__name__}: {error!s:.80}")
    return found


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))


@pytest.fixture(scope="module")
def scorer(encoder):
    return CrossAttnScorer.from_pretrained(encoder.backbone, preset="paper", timesteps=(50,))


pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.wrong_type]


def test_readings(encoder):
    features = encoder.extract(IMAGE, "red", conditioning="cfg")
    calls = {
        "prompts": lambda v: encoder(IMAGE, v),
        "conditioning": lambda v: encoder.extract(IMAGE, "red", conditioning=v),
        "guidance_scale": lambda v: encoder.extract(
            IMAGE, "red", conditioning="cfg", guidance_scale=v
        ),
        "output": lambda v: encoder.extract(IMAGE, "red", output=v),
        "tokens": features.tokens,
        "select": features.select,
        "tap": lambda v: features[v],
        "match_taps": lambda v: match_taps(v, encoder.backbone.taps()),
    }
    assert foreign(calls, VALUES) == []


def test_scores(scorer):
    calls = {
        "texts": lambda v: scorer(IMAGE, v),
        "seed": lambda v: scorer(IMAGE, "red", seed=v),
        "pairs": lambda v: scorer.score_pairs(IMAGE, v),
        "trials": lambda v: scorer.score(IMAGE, "red", trials=v),
        "screen_over": lambda v: scorer.score(IMAGE, "red", screen_over=v),
        "items": scorer.fit_layers,
        "reference texts": lambda v: scorer.with_options().calibrate(IMAGE, texts=v),
        "index_bytes": scorer.index_bytes,
    }
    assert foreign(calls, VALUES) == []


@pytest.mark.long
def test_word_maps(scorer):
    options = ("words", "preset", "layers", "heads", "timesteps", "seed")
    calls = {
        option: lambda v, option=option: scorer.word_maps(IMAGE, "a red circle", **{option: v})
        for option in options
    }
    assert foreign({**calls, "text": lambda v: scorer.word_maps(IMAGE, v)}, VALUES) == []


def test_pictures(encoder, scorer):
    calls = {"encoder": lambda v: encoder(v, "red"), "scorer": lambda v: scorer(v, "red")}
    assert foreign(calls, [value for value in VALUES if not isinstance(value, str)]) == []


@pytest.mark.long
def test_loading_options(tiny_sd_folder, encoder):
    names = ("device", "dtype", "prediction_type", "architecture", "keep_taps", "vae", "tokenizer")
    calls = {
        name: lambda v, name=name: v is None or load_backbone(tiny_sd_folder, **{name: v})
        for name in names
    }
    own = ("taps", "preset", "truncate", "trainable", "use_cache", "channels_last", "clip")
    calls |= {
        name: lambda v, name=name: DiffusionEncoder.from_pretrained(encoder.backbone, **{name: v})
        for name in own
    }
    unloading = [value for value in VALUES if value is not None]
    assert foreign(calls, unloading) == []


def test_projectors(encoder):
    calls = {
        "in_features": lambda v: Projector(v, 8),
        "out_features": lambda v: Projector(8, v),
        "kind": lambda v: Projector(8, 8, v),
        "norm_channels": lambda v: Projector(8, 8, norm_channels=v),
        "tokens": Projector(8, 8),
        "streams": lambda v: FusedProjector(v, 8, how="interleave"),
        "first_tokens": lambda v: FusedProjector((4, 4), 8, how="tokens", first_tokens=v),
        "projector_for": lambda v: projector_for(v, 8),
    }
    assert foreign(calls, VALUES) == []


@pytest.mark.long
def test_adapters_and_captioners(tiny_sd_folder, encoder):
    names = ("rank", "alpha", "dropout", "projections", "name")
    adapted = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("mid_block",))
    calls = {
        name: lambda v, name=name: adapted.add_lora(**{"name": "a", "rank": 2, name: v})
        for name in names
    }
    calls["set_lora"] = adapted.set_lora
    calls["clip"] = lambda v: DiffusionEncoder(encoder.backbone).add_captioner(v)
    assert foreign(calls, VALUES) == []


def test_objects_that_are_no_parts(encoder):
    calls = {
        "encoder": DiffusionEncoder,
        "scorer": CrossAttnScorer,
        "config": lambda v: DiffusionEncoder(encoder.backbone, v),
        "scorer's config": lambda v: CrossAttnScorer(encoder.backbone, v),
    }
    assert foreign(calls, VALUES) == []


def test_names_that_lead_nowhere(encoder, tmp_path):
    calls = {
        "load_backbone": load_backbone,
        "list_taps": list_taps,
        "encoder": DiffusionEncoder.from_pretrained,
        "scorer": CrossAttnScorer.from_pretrained,
        "fused encoder": FusedEncoder.from_pretrained,
        "projector": Projector.from_pretrained,
        "bank": QueryBank.load,
        "language model": DiffusionVLM.from_pretrained,
        "adapter": encoder.load_lora,
        "captioner": encoder.load_captioner,
    }
    assert foreign(calls, names_of_no_model(tmp_path)) == []


def test_places_where_nothing_can_be_written(encoder, scorer, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    others = [value for value in VALUES if not isinstance(value, str)]
    places = ["", "\0", "\ud800", "a" * 5000, tmp_path / "file.txt", tmp_path / "loop"]
    places += [tmp_path / "file.txt" / "inner", tmp_path / ("x" * 300)]
    calls = {
        "encoder": encoder.save_pretrained,
        "scorer": scorer.save_pretrained,
        "projector": Projector(4, 4).save_pretrained,
    }
    assert foreign(calls, [*others, *places]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "loop"]
