"""Text scores of the denoising error by timesteps and draws, on validation scenes.

    python tools/shapes/validate_timesteps.py --kind noun --kind count

What `measure.py` takes for the card was chosen by this: the five timesteps with the best text score
of nouns and of counts, the two kinds that were hardest. No held-out scene is looked at.
"""

import argparse
import itertools
import json

import torch
from measure import pixel_values
from torch import Tensor
from training import VALIDATION_SEED

from diffenc.inputs.latents import encode_latents
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.models.shapes import shapes_folder
from diffenc.scorer import denoising_scores
from diffenc.shapes.pairs import WINOGROUND_KINDS, WinogroundKind, winoground_items

TIMESTEPS = (200, 300, 400, 500, 600, 700, 800)
DRAWS = 4
CHOSEN = 5


@torch.no_grad()
def scores(backbone: Backbone, kind: WinogroundKind, count: int) -> Tensor:
    """Of items, draws, timesteps, pictures and texts."""
    found = []
    for item in winoground_items(count, seed=VALIDATION_SEED, kinds=[kind]):
        latents = encode_latents(backbone.vae, pixel_values(list(item.scenes)))
        found.append(
            torch.stack(
                [
                    torch.stack(
                        [
                            denoising_scores(
                                backbone, latents, item.captions, timesteps=(step,), seed=draw
                            )
                            for step in TIMESTEPS
                        ]
                    )
                    for draw in range(DRAWS)
                ]
            )
        )
    return torch.stack(found)


def text_score(table: Tensor) -> float:
    """Percentage of items (n 2 2) in which each picture prefers its own text."""
    right = (table[:, 0, 0] > table[:, 0, 1]) & (table[:, 1, 1] > table[:, 1, 0])
    return round(100 * right.float().mean().item(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=WINOGROUND_KINDS)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = load_backbone(shapes_folder())
    found: dict[str, dict[str, list[float]]] = {}
    for kind in options.kind or WINOGROUND_KINDS:
        table = scores(backbone, kind, options.items)
        found[kind] = {
            ", ".join(str(TIMESTEPS[k]) for k in chosen): [
                text_score(table[:, :draws, list(chosen)].mean(dim=(1, 2)))
                for draws in (1, 2, DRAWS)
            ]
            for chosen in itertools.combinations(range(len(TIMESTEPS)), CHOSEN)
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
