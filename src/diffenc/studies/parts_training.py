"""Train what an encoder can train, LoRA or the implicit captioner, on questions and answers."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from diffenc.encoder import DiffusionEncoder
from diffenc.studies.parts_reader import AnswerReader, Questions
from diffenc.studies.parts_results import ASKED, Reader

_READER_RATE = 5e-3


def train_part(
    encoder: DiffusionEncoder,
    readers: dict[Reader, AnswerReader],
    questions: Questions,
    pictures: Sequence[Image.Image],
    *,
    prompts: Sequence[str] | None,
    split: int,
    epochs: int,
    batch_size: int,
    grid: int,
    rate: float,
    seed: int,
    done: Callable[[int], object],
) -> None:
    """Lower the readers' loss on the first rows, by what the encoder trains and by the readers.

    Args:
        encoder: Encoder with LoRA or a captioner, which are trained in place.
        readers: Readers that were fitted to the features that the encoder had before; trained in
            place too.
        questions: Questions of all rows.
        pictures: Picture of each scene.
        prompts: Prompts of the U-Net, one per row. None is the empty prompt for all rows; one pass
            then serves the three questions to a scene.
        split: Number of rows to train on, counted from the first.
        epochs: Number of passes over these rows.
        batch_size: Number of rows of the U-Net per step.
        grid: Side of the token grid, in tokens.
        rate: Highest learning rate of the encoder's trainable weights.
        seed: Seed of the order of rows.
        done: Function that is called after each step with its number of rows of the U-Net.
    """
    models = [reader.requires_grad_(True) for reader in readers.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(encoder.trainable_parameters()), "lr": rate},
            {
                "params": [p for model in models for p in model.parameters()],
                "lr": _READER_RATE,
            },
        ],
        weight_decay=0.0,
    )
    order = torch.Generator("cpu").manual_seed(seed)
    count = split // len(ASKED) if prompts is None else split
    batches = [
        units
        for _ in range(epochs)
        for units in torch.randperm(count, generator=order, dtype=torch.long, device="cpu").split(
            batch_size
        )
    ]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, _READER_RATE], total_steps=len(batches)
    )
    encoder.train()
    for units in batches:
        tokens, rows = _tokens(encoder, pictures, units, prompts=prompts, grid=grid)
        loss = torch.stack(
            [
                questions.loss(model(tokens, questions.queries[reader][rows]), rows)
                for reader, model in readers.items()
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done(len(units))
    encoder.eval().requires_grad_(False)


def _tokens(
    encoder: DiffusionEncoder,
    pictures: Sequence[Image.Image],
    units: Tensor,
    *,
    prompts: Sequence[str] | None,
    grid: int,
) -> tuple[Tensor, Tensor]:
    """Tokens with a graph, and the rows that they serve."""
    each = len(ASKED)
    scenes = (units if prompts is None else units // each).tolist()
    texts = "" if prompts is None else [prompts[row] for row in units.tolist()]
    images = [pictures[scene] for scene in scenes]
    tokens = encoder.extract(images, texts, conditioning="cond").tokens(grid).float().cpu()
    if prompts is not None:
        return tokens, units
    rows = (units[:, None] * each + torch.arange(each, dtype=torch.long, device="cpu")).flatten()
    return tokens.repeat_interleave(each, dim=0), rows
