"""A host laid out as LLaVA, on transformers' own Llama: what `register` expects, and no more.

The images stand at -200, padding is cut by the attention mask, and a sample without an image takes
one image that leaves no tokens: the rules of LLaVA, written anew.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SOURCE_MODULES = (
    "",
    ".model",
    ".model.multimodal_encoder",
    ".model.multimodal_encoder.builder",
    ".model.llava_arch",
    ".model.builder",
    ".train",
    ".train.train",
)


class OtherTower(nn.Module):
    """What the host builds by itself."""


def build_vision_tower(cfg: Any, **kwargs: Any) -> Any:
    return OtherTower()


class LlavaMetaModel:
    """Builds its tower from a config."""

    def __init__(self, config: Any) -> None:
        self.vision_tower = build_vision_tower(config, delay_load=True)


class LlavaMetaForCausalLM:
    """Splices features of images into the embeddings of words."""

    def prepare_inputs_labels_for_multimodal(
        self: Any,
        input_ids: Tensor,
        position_ids: Any,
        attention_mask: Any,
        past_key_values: Any,
        labels: Any,
        images: Any,
        image_sizes: Any = None,
    ) -> Any:
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        if isinstance(images, list) or images.ndim == 5:
            tiles = [image[None] if image.ndim == 3 else image for image in images]
            features = self.encode_images(torch.cat(tiles)).split([len(tile) for tile in tiles])
            features = [part.flatten(0, 1) for part in features]
        else:
            features = list(self.encode_images(images))
        rows = []
        for ids, mask in zip(
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            strict=True,
        ):
            ids, parts, start = ids[mask.bool()], [], 0  # noqa: PLW2901
            places = (ids == -200).nonzero().flatten().tolist()
            if not places:
                features.pop(0)
            for place in places:
                parts += [self.model.embed_tokens(ids[start:place]), features.pop(0)]
                start = place + 1
            rows.append(torch.cat([*parts, self.model.embed_tokens(ids[start:])]))
        longest = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(r, (0, 0, 0, longest - len(r))) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        return None, None, mask, past_key_values, embeds, None

    def encode_images(self: Any, images: Tensor) -> Tensor:
        return self.model.mm_projector(self.model.vision_tower(images))

    def get_vision_tower(self: Any) -> Any:
        return self.model.vision_tower


class ToyLlava(LlamaForCausalLM, LlavaMetaForCausalLM):
    """A model that asks its tower in `forward`, and in `generate` once."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        return_dict: bool | None = None,
        cache_position: Any = None,  # transformers 4.42 to 4.57 pass it
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )

    @torch.no_grad()
    def generate(self, inputs: Any = None, images: Any = None, **kwargs: Any) -> Any:
        mask = kwargs.pop("attention_mask", None)
        prepared = self.prepare_inputs_labels_for_multimodal(inputs, None, mask, None, None, images)
        return super().generate(inputs_embeds=prepared[4], attention_mask=prepared[2], **kwargs)


class OldToyLlava(ToyLlava):
    """A model of the older kind: images go through transformers' `generate`, beams and all."""

    generate = LlamaForCausalLM.generate

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        # No cache, so that the tower is asked at every step.
        mask = torch.ones_like(input_ids)
        return {"input_ids": input_ids, "attention_mask": mask, "images": kwargs["images"]}


def toy_model(tower: nn.Module, kind: type = ToyLlava) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        model.model.mm_projector = nn.Linear(tower.hidden_size, 16)
    model.model.vision_tower = tower
    return model


def load_pretrained_model(model_path: Any, model_base: Any, name: str, model: Any = None) -> Any:
    return "tokenizer", model, "processor", 2048


class ToyDataset(torch.utils.data.Dataset):
    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.list_data_dict = entries

    def __len__(self) -> int:
        return len(self.list_data_dict)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([1, -200, 5]), "image": torch.zeros(3, 64, 64)}

    @property
    def modality_lengths(self) -> list[int]:
        return [7] * len(self)


def toy_collator(instances: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(set(instance) == {"input_ids", "image"} for instance in instances)
    return {"input_ids": torch.stack([instance["input_ids"] for instance in instances])}


class ToyTrainer:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.callbacks: list[Any] = []
        self.options = kwargs

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)


TRAIN = """
def train(entries):
    data_module = make_supervised_data_module(entries)
    return LLaVATrainer(**data_module)
"""


@contextmanager
def toy_package(name: str, **left_out: Any) -> Iterator[types.SimpleNamespace]:
    """The host as an importable package, gone afterwards."""
    made = {suffix: types.ModuleType(name + suffix) for suffix in SOURCE_MODULES}
    for module in made.values():
        module.__path__ = []  # type: ignore[attr-defined]
    builder, arch = made[".model.multimodal_encoder.builder"], made[".model.llava_arch"]
    builder.build_vision_tower = arch.build_vision_tower = build_vision_tower  # type: ignore[attr-defined]
    for part in (LlavaMetaModel, LlavaMetaForCausalLM, ToyLlava):
        setattr(arch, part.__name__, part)
    made[".model.builder"].load_pretrained_model = load_pretrained_model  # type: ignore[attr-defined]
    script = made[".train.train"]
    script.LLaVATrainer = ToyTrainer  # type: ignore[attr-defined]
    script.make_supervised_data_module = lambda entries: {  # type: ignore[attr-defined]
        "train_dataset": ToyDataset(entries),
        "eval_dataset": None,
        "data_collator": toy_collator,
    }
    exec(TRAIN, vars(script))  # as a file would: its names are the module's
    for suffix, attribute in left_out.items():
        delattr(made[suffix], attribute)
    sys.modules.update({module.__name__: module for module in made.values()})
    try:
        yield types.SimpleNamespace(builder=builder, arch=arch, script=script, modules=made)
    finally:
        for module in made.values():
            sys.modules.pop(module.__name__, None)
