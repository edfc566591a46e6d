"""Data of the miniature world: LLaVA's JSON files, phrases with boxes, and a folder of pictures.

python -m diffenc.mllm.training.miniature shapes-llava --scenes 2000
"""

import argparse
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.shapes import captions, conversation, render, sample_scenes
from diffenc.shapes.crowds import sample_crowds
from diffenc.shapes.phrases import named_boxes, scene_text
from diffenc.shapes.questions import without_names
from diffenc.storage.writing import make_folder, reporting, write_json, write_text

REQUEST = "describe the picture."
EDITIONS = {"align": 1, "instruct": 2, "asked": 2}
"""Number of each file's making: equal arguments gave other texts before it was raised."""
_CAPTIONS = 5


def write_miniature(
    folder: "str | os.PathLike[str]",
    *,
    scenes: int = 2000,
    seed: int = 0,
    turns: int = 3,
    lettered: int = 2,
    size: int = 64,
    crowds: bool = False,
) -> dict[str, Path]:
    """Write pictures, captions for the first stage, conversations for the second, and phrases.

    Every sample has five captions beside its conversation, from which prompt policies draw.

    In ``asked.json`` the human's turn says what is asked for and not of which objects ("what
    color?"): the first question of the conversation is the sample's only caption, for the encoder
    and not for the language model.

    Phrases say which words of a caption, a question or a reference ("the red object") name which
    boxes, two texts a scene.

    Args:
        folder: Folder to write ``align.json``, ``instruct.json``, ``asked.json``,
            ``phrases.jsonl`` and ``images/`` to.
        scenes: Number of scenes.
        seed: Seed of the scenes; other seeds give other scenes.
        turns: Largest number of questions of a conversation that are answered in words.
        lettered: Number of further questions of a conversation that list options, in the words of
            the miniature's MMVP and BLINK, and are answered by a letter.
        size: Side of the pictures, in pixels.
        crowds: Whether scenes have five to nine objects, see `diffenc.shapes.sample_crowd`;
            otherwise they have one to three.

    Returns:
        Paths under "align", "instruct", "asked", "phrases" and "images".

    Raises:
        ConfigError: There would be no scene.
        OutputError: The folder cannot be written.
    """
    if scenes < 1:
        raise ConfigError(f"scenes must be 1 or more, got {scenes}")
    target = Path(folder)
    paths = {name: target / f"{name}.json" for name in EDITIONS}
    paths["phrases"], paths["images"] = target / "phrases.jsonl", target / "images"
    phrases: list[dict[str, Any]] = []
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in EDITIONS}
    make_folder(paths["images"])
    sample = sample_crowds if crowds else sample_scenes
    with reporting(target):
        for index, scene in enumerate(sample(scenes, seed=seed)):
            name = f"{index:06}.png"
            render(scene, size).save(paths["images"] / name)
            texts = captions(scene, _CAPTIONS, seed=index)
            shared = {"id": f"{seed}-{index:06}", "image": name, "captions": texts}
            instructions = [
                {"from": "human", "value": f"<image>\n{REQUEST}"},
                {"from": "gpt", "value": texts[0]},
            ]
            talk = conversation(scene, turns=turns, lettered=lettered, even=True, seed=index)
            records["align"].append({**shared, "conversations": instructions})
            records["instruct"].append({**shared, "conversations": talk})
            records["asked"].append({**shared, **asked_through_the_encoder(talk)})
            rng = random.Random(f"phrases/{seed}/{index}")
            phrases += [
                {"image": name, "text": text, "phrases": named_boxes(scene, text, size)}
                for text in (scene_text(scene, rng), scene_text(scene, rng))
            ]
    for name, content in records.items():
        write_json(paths[name], content, indent=1)
    write_text(paths["phrases"], "".join(f"{json.dumps(each)}\n" for each in phrases))
    return paths


def asked_through_the_encoder(talk: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The first question of a conversation as a caption, and a request that names no object."""
    question, answer = talk[0]["value"].removeprefix("<image>\n"), talk[1]
    request = {"from": "human", "value": f"<image>\n{without_names(question)}"}
    return {"captions": [question], "conversations": [request, dict(answer)]}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--lettered", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--crowds", action="store_true")
    write_miniature(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
