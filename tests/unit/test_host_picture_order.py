"""Each picture reads the prompt of its own sample, in whatever order a host shows pictures."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffenc.errors import PromptError
from diffenc.hosts.llava import take_prompts
from diffenc.hosts.llava.ownership import read_numbers
from diffenc.hosts.prompts import PromptTokens
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.shapes import render, sample_scenes
from toy_llava import ToyLlava, toy_model

ONE, OTHER = "what color is the circle?", "how many stars are there?"
ROW = [1, -200, 5]


@pytest.fixture(scope="module")
def tower() -> DiffusionVisionTower:
    return DiffusionVisionTower("diffenc:shapes?t=50&grid=2")


@pytest.fixture(scope="module")
def tiles(tower) -> Tensor:
    """Two samples of three tiles each: (2, 3, 3, height, width)."""
    pictures = [render(scene) for scene in sample_scenes(6, seed=4)]
    values: Tensor = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return values.unflatten(0, (2, 3))


class WholeViewsLast(ToyLlava):
    """Shows the tiles of all samples, then the last of each, and puts features together again."""

    def encode_images(self, images: Tensor) -> Tensor:
        groups = images.unflatten(0, (-1, 3))
        shown = torch.cat([groups[:, :-1].flatten(0, 1), groups[:, -1]])
        features = self.model.vision_tower(shown)
        tiled, whole = features[: 2 * len(groups)], features[2 * len(groups) :]
        joined = torch.cat([tiled.unflatten(0, (-1, 2)), whole[:, None]], dim=1).flatten(0, 1)
        projected: Tensor = self.model.mm_projector(joined)
        return projected


class Backwards(ToyLlava):
    """Shows pictures from the last to the first, in half precision, as a list."""

    def encode_images(self, images: Tensor) -> Tensor:
        features = self.model.vision_tower(list(images.flip(0).bfloat16()))
        projected: Tensor = self.model.mm_projector(torch.cat(features).flip(0).float())
        return projected


class Shuffling(ToyLlava):
    """Draws the order in which it shows pictures."""

    def encode_images(self, images: Tensor) -> Tensor:
        order = torch.randperm(len(images)).tolist()
        random.shuffle(order)
        order = np.random.permutation(order).tolist()  # noqa: NPY002  # as hosts do
        features = self.model.vision_tower(images[order])
        projected: Tensor = self.model.mm_projector(features[np.argsort(order).tolist()])
        return projected


class MoreArguments(ToyLlava):
    """Takes further arguments by any name."""

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Any, *rest: Any, images: Any = None, **more: Any
    ) -> Any:
        assert "more" not in more
        return super().prepare_inputs_labels_for_multimodal(input_ids, *rest, images, **more)

    def forward(self, input_ids: Any = None, images: Any = None, **kwargs: Any) -> Any:
        prepared = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, None, None, None, images=images, image_sizes=[1]
        )
        return self.model(inputs_embeds=prepared[4], attention_mask=prepared[2])


class OfSeveralTowers(ToyLlava):
    """Has a list of towers, and is shown a batch of pictures for each; only one is diffenc's."""

    @property
    def get_vision_tower(self) -> Any:
        raise AttributeError  # there is no such thing as the tower

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Any, position_ids: Any, mask: Any, past: Any, labels: Any, images: Any
    ) -> Any:
        shown = images[1].flip(0)
        features = self.model.mm_projector(self.model.towers[1](shown)).flip(0)
        self.encode_images = lambda _: features
        return super().prepare_inputs_labels_for_multimodal(
            input_ids, position_ids, mask, past, labels, images[0]
        )


class Resizing(ToyLlava):
    """Shows each picture whole and enlarged, and takes the mean, as scale-space wrappers do."""

    def encode_images(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        large = nn.functional.interpolate(images, scale_factor=2.0, mode="bilinear")
        shown = torch.cat([images, large[..., :side, :side], torch.zeros_like(images[:1])])
        features = self.model.vision_tower(shown)[:-1]
        projected: Tensor = self.model.mm_projector(features.unflatten(0, (2, -1)).mean(0))
        return projected


class Blending(ToyLlava):
    """Mixes the pictures of a batch before the tower sees them."""

    def encode_images(self, images: Tensor) -> Tensor:
        projected: Tensor = self.model.mm_projector(self.model.vision_tower(images.roll(1, 0) / 2))
        return projected


class AskingTwice(ToyLlava):
    """Calls its tower a second time, for pictures in another order."""

    def encode_images(self, images: Tensor) -> Tensor:
        features = self.model.vision_tower(images) + self.model.vision_tower(images.flip(0))
        projected: Tensor = self.model.mm_projector(features)
        return projected


class NeverAsking(ToyLlava):
    """Takes features from elsewhere."""

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 4, 16)


class Failing(ToyLlava):
    """Insists on values that only pictures have."""

    def encode_images(self, images: Tensor) -> Tensor:
        if images.max() > 1:
            raise ValueError("too bright")
        projected: Tensor = self.model.mm_projector(self.model.vision_tower(images))
        return projected


def logits(kind: type, tower: Any, samples: Any, prompts: list[str]) -> Tensor:
    model = take_prompts(toy_model(tower, kind))
    tokens = tower.tokenize(prompts)
    ids = torch.tensor([ROW] * len(samples))
    with torch.no_grad():
        out = model(
            ids, images=samples, vision_prompt_ids=tokens.ids, vision_prompt_mask=tokens.mask
        )
    result: Tensor = out.logits
    return result


@pytest.mark.parametrize("kind", [ToyLlava, WholeViewsLast, Backwards, Shuffling])
@pytest.mark.parametrize("form", ["stacked", "list"])
def test_a_batch_of_tiles_equals_its_samples(tower, tiles, kind, form) -> None:
    samples = tiles if form == "stacked" else list(tiles)
    batch = logits(kind, tower, samples, [ONE, OTHER])
    for row, prompt in enumerate([ONE, OTHER]):
        alone = logits(kind, tower, samples[row : row + 1], [prompt])
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=1e-4)
    exchanged = logits(kind, tower, samples, [OTHER, ONE])
    assert (exchanged - batch).abs().amax((1, 2)).min() > 1e-4


def test_a_host_of_several_towers_shows_each_a_batch(tower, tiles) -> None:
    model = take_prompts(toy_model(tower, OfSeveralTowers))
    model.model.towers = ["another", tower]
    tokens = tower.tokenize([ONE, OTHER])
    pictures = tiles[:, 0]

    def answer(rows: list[int], questions: list[int]) -> Tensor:
        shown, chosen = pictures[rows], tokens.take(questions)
        with torch.no_grad():
            out = model(
                torch.tensor([ROW] * len(rows)),
                images=[torch.zeros_like(shown), shown],
                vision_prompt_ids=chosen.ids,
                vision_prompt_mask=chosen.mask,
            )
        logits: Tensor = out.logits
        return logits

    batch = answer([0, 1], [0, 1])
    for row in (0, 1):
        torch.testing.assert_close(batch[row], answer([row], [row])[0], atol=1e-5, rtol=1e-4)
        assert (batch[row] - answer([row], [1 - row])[0]).abs().max() > 1e-4


def test_further_arguments_of_a_host_reach_it_as_they_are(tower, tiles) -> None:
    model = take_prompts(toy_model(tower, MoreArguments))
    tokens = tower.tokenize([ONE, OTHER])
    prompt_tensors = {"vision_prompt_ids": tokens.ids, "vision_prompt_mask": tokens.mask}
    with torch.no_grad():
        states = model(
            torch.tensor([ROW] * 2), images=tiles[:, 0], **prompt_tensors
        ).last_hidden_state
        plain = take_prompts(toy_model(tower))(
            torch.tensor([ROW] * 2), images=tiles[:, 0], **prompt_tensors
        )
        torch.testing.assert_close(model.lm_head(states), plain.logits)


def test_a_host_that_resizes_repeats_and_adds_blank_pictures_is_understood(tower, tiles) -> None:
    pictures = tiles[:, 0]
    batch = logits(Resizing, tower, pictures, [ONE, OTHER])
    for row, prompt in enumerate([ONE, OTHER]):
        alone = logits(Resizing, tower, pictures[row : row + 1], [prompt])
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Blending, "changes pictures"),
        (AskingTwice, "once more"),
        (NeverAsking, "without calling the tower"),
        (Failing, "too bright"),
    ],
)
def test_what_cannot_be_known_is_refused(tower, tiles, kind, reason) -> None:
    with pytest.raises(PromptError, match=reason):
        logits(kind, tower, tiles[:, 0], [ONE, OTHER])


def test_one_prompt_for_all_needs_no_order(tower, tiles) -> None:
    for kind in (Blending, AskingTwice, Failing):
        one = logits(kind, tower, tiles[:, 0], [ONE])
        assert torch.equal(one, logits(kind, tower, tiles[:, 0], [ONE, ONE]))


def test_asking_changes_neither_arguments_nor_pictures(tower, tiles) -> None:
    class Overwriting(ToyLlava):
        def encode_images(self, images: Tensor) -> Tensor:
            projected: Tensor = self.model.mm_projector(self.model.vision_tower(images.clone()))
            images.zero_()
            return projected

        def prepare_inputs_labels_for_multimodal(
            self,
            input_ids: Tensor,
            position_ids: Any,
            mask: Any,
            past: Any,
            labels: Any,
            images: Any,
        ) -> Any:
            before = input_ids.clone()
            input_ids.zero_()
            return super().prepare_inputs_labels_for_multimodal(
                before, position_ids, mask, past, labels, images
            )

    # Its own doing in the call itself; before it, in the call that asks, nothing may happen.
    pictures = tiles[:, 0]
    expected = logits(ToyLlava, tower, pictures, [ONE, OTHER])
    assert torch.equal(logits(Overwriting, tower, pictures.clone(), [ONE, OTHER]), expected)


def test_more_samples_than_one_channel_counts(tower, tiles) -> None:
    pictures = tiles[0, :1].expand(102, -1, -1, -1)
    batch = logits(Backwards, tower, pictures, [ONE] * 101 + [OTHER])
    torch.testing.assert_close(batch[:101], batch[:1].expand(101, -1, -1), atol=1e-5, rtol=1e-4)
    assert (batch[101] - batch[0]).abs().max() > 1e-4


def test_numbers_are_read_from_blank_pictures_alone() -> None:
    pictures = torch.zeros(4, 3, 5, 7)
    pictures[0, 0], pictures[1, 0], pictures[1, 1] = 42, 3, 2
    pictures[2, 0] = torch.arange(35.0).view(5, 7)
    pictures[3, 2] = 1
    assert read_numbers(pictures) == [42, 203, None, None]


def test_a_row_without_a_prompt_is_absent() -> None:
    tokens = PromptTokens(torch.tensor([[1, 4, 2], [1, 5, 2]]), torch.ones(2, 3).long())
    rows = tokens.take_or_none([1, None, 0])
    assert rows.is_absent() == [False, True, False]
    assert rows.ids[0].tolist() == [1, 5, 2]
    assert not tokens.all_equal()
    assert tokens.take([1, 1]).all_equal()
