"""Saved folders with random damage: each ends in an error of the library, or in a sound model.

A model is sound where two loads of it are equal bit by bit, whole and truncated: weights that a
library draws at random for want of others differ from load to load.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import builders
from diffenc import DiffusionEncoder
from diffenc.errors import DiffencError

IMAGE = torch.linspace(-1, 1, 3 * 32 * 48).reshape(3, 32, 48)
VALUES = [
    None, True, 0, -1, 1, 3, 2**31, 10**15, 10**30, 0.5, -1.5, 1e300, float("nan"), float("-inf"),
    "", "x", "../x", [], [1], [-1, 2], ["x"], [[1]], {}, {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """A Stable Diffusion of two levels, which loads in a blink."""
    folder = tmp_path_factory.mktemp("smallest")
    pipeline = StableDiffusionPipeline(
        vae=builders.tiny_vae(),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
        unet=builders.tiny_unet(),
        scheduler=DDIMScheduler(**builders.NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def mutate(folder: Path, dice: random.Random) -> str:
    """Damage one file, and say how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = dice.choice(files)
    kinds: dict[str, Callable[[Path, random.Random, list[Path]], Any]] = {
        "deleted": lambda path, *_: path.unlink(),
        "renamed": lambda path, *_: path.rename(path.with_name(f"{path.name}.old")),
        "moved": lambda path, dice, files: path.replace(dice.choice(files)),
        "cut": lambda path, dice, _: path.write_bytes(
            path.read_bytes()[: dice.randrange(path.stat().st_size + 1)]
        ),
        "garbled": _garble,
        "replaced": lambda path, dice, files: (
            shutil.copy(dice.choice(files), path.parent / "x") and (path.parent / "x").replace(path)
        ),
    }
    own = {".json": _json, ".safetensors": _tensors}.get(path.suffix)
    kind = dice.choice(list(kinds)) if own is None or dice.random() < 0.3 else "changed"
    detail = (own if kind == "changed" and own else kinds[kind])(path, dice, files)
    return f"{path.relative_to(folder)} {kind}: {detail}"


def _garble(path: Path, dice: random.Random, _: list[Path]) -> int:
    content = bytearray(path.read_bytes())
    for _step in range(dice.choice([1, 4, 50])):
        if content:
            content[dice.randrange(len(content))] = dice.randrange(256)
    return path.write_bytes(bytes(content))


def _json(path: Path, dice: random.Random, _: list[Path]) -> str:
    content = json.loads(path.read_text())
    value = copy.deepcopy(dice.choice(VALUES))
    if not isinstance(content, dict) or not content or dice.random() < 0.05:
        path.write_text(json.dumps(value))
        return f"= {value}"
    key = dice.choice(sorted(content))
    if dice.random() < 0.25:
        del content[key]
        detail = f"without {key}"
    elif dice.random() < 0.2:
        content[f"{key}s"] = content.pop(key)
        detail = f"{key} renamed"
    else:
        if isinstance(content[key], list) and content[key] and dice.random() < 0.5:
            content[key][dice.randrange(len(content[key]))] = value
        elif isinstance(content[key], int) and dice.random() < 0.5:
            content[key] = content[key] * 2 + 1
        else:
            content[key] = value
        detail = f"{key}={content[key]}"
    path.write_text(json.dumps(content))
    return detail[:200]


def _tensors(path: Path, dice: random.Random, _: list[Path]) -> str:
    state = load_file(path)
    name = dice.choice(sorted(state))
    value = state.pop(name)
    kind = dice.choice(["gone", "renamed", "shape", "type", "nan", "prefix", "twice", "short"])
    if kind == "renamed":
        state[f"{name}s"] = value
    elif kind == "shape":
        state[name] = value[None] if dice.random() < 0.5 else value.flatten()[:-1]
    elif kind == "type":
        state[name] = value.to(dice.choice([torch.int64, torch.int8, torch.bool, torch.float64]))
    elif kind == "nan":
        state[name] = value * dice.choice([float("nan"), 1e38, -1.0])
    elif kind == "twice":
        state[name], state[f"text_model.{name}"] = value, value.clone()
    elif kind == "prefix":
        state = {f"unet.{key}": entry for key, entry in {**state, name: value}.items()}
    elif kind == "short":
        state = dict(list({**state, name: value}.items())[: len(state) // 2])
    save_file({key: entry.contiguous() for key, entry in state.items()}, path, {"format": "pt"})
    return f"{name} {kind}"


def outcome(folder: Path, taps: tuple[str, ...], *, truncate: bool) -> Any:
    """Weights and features of a folder, or None where the library says what is wrong."""
    options = {"taps": taps, "size": (32, 48), "truncate": truncate, "use_cache": False}
    try:
        encoder = DiffusionEncoder.from_pretrained(folder, **options)
    except DiffencError:
        return None
    state = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    try:
        return state, encoder(IMAGE, "red circle")
    except DiffencError:
        return state, None


def check(folder: Path, target: Path, seed: int, taps: tuple[str, ...]) -> None:
    shutil.copytree(folder, target)
    damage = mutate(target, random.Random(seed))
    whole, again, short = (outcome(target, taps, truncate=cut) for cut in (False, False, True))
    assert (whole is None) == (again is None), damage
    if whole is None or again is None:
        return
    assert short is not None, damage
    for one, other in ((whole, again), (short, whole)):
        assert all(torch.equal(value, other[0][name]) for name, value in one[0].items()), damage
        if one[1] is not None:
            torch.testing.assert_close(one[1], other[1], msg=damage)
            assert torch.isfinite(one[1]).all(), damage


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(4))
def test_a_damaged_folder_is_refused_or_sound(smallest, tmp_path, block):
    for seed in range(10 * block, 10 * block + 10):
        check(smallest, tmp_path / str(seed), seed, ("mid_block",))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(15))
@pytest.mark.parametrize("kind", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_many_damaged_folders_are_refused_or_sound(request, tmp_path, kind, block):
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        check(request.getfixturevalue(kind), tmp_path / str(seed), seed, ("mid_block",))
        shutil.rmtree(tmp_path / str(seed))
