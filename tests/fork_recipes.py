"""Forks of LLaVA that the guide "A recipe for each fork" names, and what tests build of them.

A fork is a row here and a section of the guide, whose lines are run as they stand.
"""

import importlib
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch

import fork_world
from diffenc.hosts.llava.register import restore_adapters

INITIAL = {
    "vision_tower": fork_world.TOWER,
    "vision_tower_aux": None,
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "pretrain_mm_mlp_adapter": None,
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "mlp2x_gelu",
    "add_faster_video": False,
}
"""Options of a fork's model that `initialize_vision_modules` reads."""

CAMBRIAN = {
    "num_query_group": 1,
    "query_num_list": [64],
    "vision_hidden_size": 32,
    "vision_tower_aux_list": [fork_world.TOWER],
    "vision_tower_aux_token_len_list": [64],
    "image_token_len": 64,
    "connector_only": True,
    "connector_depth": 1,
    "unfreeze_mm_vision_tower": True,
}


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A fork, and a tiny model of its own classes.

    Attributes:
        title: Heading of its section in the guide.
        folder: Name of its checkout.
        commit: Commit that was tried.
        package: Its top-level module.
        classes: Module, config class and model class of its language model.
        options: Further options of that config.
        initial: Further options that `initialize_vision_modules` reads.
        absent: Packages that only towers import which are not used here, replaced by empty ones.
        name: Name that its loader takes a checkpoint for its own by.
        loading: Further arguments of its loader.
        build: Function that makes the model, in place of the one for LLaVA's kin.
        load: Function that loads a checkpoint's folder, in place of the fork's loader; a fork that
            keeps no checkpoints of its own kind has `loads` false.
        generates: Whether its `generate` runs on the versions of `make forks`.
        call: Function that makes further arguments of a call from the number of samples.
        shown: Function that brings pictures, one a sample, to the form that the fork takes.
        training: Options of its training script beside those of LLaVA's; None where it has none
            that runs here.
        base: Name of the folder of the language model that training starts from.
        label: Name in tables; the title where there is none.
    """

    title: str
    folder: str
    commit: str
    package: str
    classes: str
    options: dict[str, Any] = field(default_factory=dict)
    initial: dict[str, Any] = field(default_factory=dict)
    absent: Sequence[str] = ()
    name: str = "llava-tiny"
    loading: dict[str, Any] = field(default_factory=lambda: {"device": "cpu"})
    build: "Callable[[Fork, Path], Any] | None" = None
    load: "Callable[[Fork, Path], Any] | None" = None
    loads: bool = True
    generates: bool = True
    call: Callable[[int], dict[str, Any]] = lambda _: {}
    shown: Callable[[torch.Tensor], Any] = lambda pixels: pixels
    training: str | None = None
    base: str = "vicuna-base"
    label: str = ""

    @property
    def called(self) -> str:
        """Name in tables."""
        return self.label or self.title

    @property
    def kinds(self) -> tuple[type, type]:
        """Classes of config and model."""
        module, config, model = self.classes.split()
        part = importlib.import_module(f"{self.package}.{module}")
        return getattr(part, config), getattr(part, model)

    def model(self, folder: Path) -> Any:
        """A model of the fork's own classes, around a tower with an adapter."""
        if self.build is not None:
            return self.build(self, folder)
        model = fork_world.language_model(*self.kinds, **self.options)
        torch.manual_seed(1)
        initial = types.SimpleNamespace(**{**INITIAL, **self.initial})
        model.get_model().initialize_vision_modules(initial)
        model.config.tokenizer_model_max_length = 512
        if getattr(model.config, "mm_vision_tower_aux", "") is None:
            del model.config.mm_vision_tower_aux  # MGM builds a second tower of any name
        return model

    def loaded(self, folder: Path) -> Any:
        """A model that was saved in a folder by the fork's name for its own, with its adapter."""
        if self.load is not None:
            return self.load(self, folder)
        loader = importlib.import_module(f"{self.package}.model.builder").load_pretrained_model
        return loader(str(folder), None, self.name, **self.loading)[1].float()


def _of_class(fork: Fork, folder: Path) -> Any:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if config.get("mm_vision_tower_aux", "") is None:
        del config["mm_vision_tower_aux"]  # MGM builds a second tower of any name
        file.write_text(json.dumps(config))
    model = fork.kinds[1].from_pretrained(str(folder))  # type: ignore[attr-defined]
    restore_adapters(model, [str(folder)])
    return model


class _Aux(torch.nn.Module):
    """A second tower of MGM, which sees pictures of twice the size: 8 channels, 32 x 32."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 32).repeat(1, 3, 1, 1)[:, :8]


def _mgm_hd(fork: Fork, folder: Path) -> Any:
    config, kind = fork.kinds
    model = fork_world.language_model(config, kind, max_position_embeddings=2048)
    model.config.image_grid, model.config.image_global = 2, True
    initial = types.SimpleNamespace(**{**INITIAL, "vision_tower": f"{fork_world.TOWER}&grid=4"})
    inner = model.get_model()
    inner.initialize_vision_modules(initial)
    inner.vision_tower_aux = _Aux()
    wide = inner.config.mm_hidden_size
    for name, channels in (("query", wide), ("aux", 8), ("val", 8)):
        layers = torch.nn.LayerNorm(channels), torch.nn.Linear(channels, wide)
        setattr(inner, f"vlm_uni_{name}_projector", torch.nn.Sequential(*layers))
    return model


def _prismatic(fork: Fork, folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    fork_world.write_base(folder / "base", LlamaConfig, LlamaForCausalLM, vocab_size=64)
    words = fork_world.tokenizer()
    words.add_tokens(["True", "False", "Yes", "No", *ascii_uppercase])  # each must be one token
    words.save_pretrained(folder / "base")
    llama2 = importlib.import_module("prismatic.models.backbones.llm.llama2")
    materialize = importlib.import_module("prismatic.models.materialize")
    llama2.LLAMA2_MODELS["tiny"] = {
        "llm_family": "llama2",
        "llm_cls": LlamaForCausalLM,
        "hf_hub_path": str(folder / "base"),
    }
    vision, _ = materialize.get_vision_backbone_and_transform("diffenc-tower", "resize-naive")
    llm = llama2.LLaMa2LLMBackbone("tiny", llm_max_length=512, use_flash_attention_2=False)
    return materialize.get_vlm("diffenc+tiny", "gelu-mlp", vision, llm)


def _tinyllava(fork: Fork, folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    fork_world.write_base(folder / "TinyLlama", LlamaConfig, LlamaForCausalLM)
    config, kind = fork.kinds
    name = importlib.import_module("diffenc.hosts.tinyllava").write_folder(
        fork_world.TOWER, folder / "tower"
    )
    made = config(
        llm_model_name_or_path=str(folder / "TinyLlama"),
        vision_model_name_or_path=name,
        connector_type="mlp2x_gelu",
        tokenizer_use_fast=True,
    )
    model = kind(made)
    model.load_llm(model_name_or_path=str(folder / "TinyLlama"))
    model.load_vision_tower(model_name_or_path=name.split(":")[-1])
    model.load_connector(connector_type="mlp2x_gelu")
    return model


_LLAVA = "model.language_model.llava_llama LlavaConfig LlavaLlamaForCausalLM"
_NEXT: dict[str, Any] = {
    "folder": "LLaVA-NeXT",
    "commit": "b42941c",  # the last before one that leaves out imports of its trainer
    "package": "llava",
    "loading": {"device_map": "auto", "attn_implementation": "eager"},
    "call": lambda samples: {"modalities": ["image"] * samples},
}

FORKS = (
    Fork(
        title="LLaVA",
        folder="LLaVA",
        commit="c121f04",
        package="llava",
        classes=_LLAVA,
        training="",
    ),
    Fork(
        title="LLaVA-NeXT",
        classes=_LLAVA,
        training="--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model "
        "--attn_implementation eager",
        **_NEXT,
    ),
    Fork(
        title="LLaVA-OneVision",
        classes="model.language_model.llava_qwen LlavaQwenConfig LlavaQwenForCausalLM",
        name="llava-qwen-tiny",
        **_NEXT,
    ),
    Fork(
        title="EAGLE",
        folder="EAGLE",
        commit="fef95f1",
        package="eagle",
        classes="model.language_model.eagle_llama EagleConfig EagleLlamaForCausalLM",
        absent=("xformers",),
        name="eagle-tiny",
        training="",
    ),
    Fork(
        title="FastVLM",
        folder="ml-fastvlm",
        commit="592b4ad",
        package="llava",
        classes="model.language_model.llava_qwen LlavaConfig LlavaQwen2ForCausalLM",
        name="llava-qwen-tiny",
        training="",
    ),
    Fork(
        title="MGM",
        folder="MGM",
        commit="769820c",
        package="mgm",
        classes="model.language_model.mgm_llama MGMConfig MGMLlamaForCausalLM",
        name="mgm-tiny",
        load=_of_class,
        training="",
    ),
    Fork(
        title="MGM",
        label="MGM-HD",
        folder="MGM",
        commit="769820c",
        package="mgm",
        classes="model.language_model.mgm_llama MGMConfig MGMLlamaForCausalLM",
        build=_mgm_hd,
        loads=False,
        call=lambda samples: {"images_aux": torch.ones(samples, 3, 64, 64) / 2},
        shown=lambda pixels: torch.stack(
            [pixels, *(pixels.roll(n, -1) for n in (8, 16, 24, 32))], 1
        ),
    ),
    Fork(
        title="ShareGPT4V",
        folder="ShareGPT4V",
        commit="b6f70e9",
        package="share4v",
        classes="model.language_model.share4v_llama Share4VConfig Share4VLlamaForCausalLM",
        name="sharegpt4v-tiny",
        training="",
    ),
    Fork(
        title="Bunny",
        folder="Bunny",
        commit="08273ac",
        package="bunny",
        classes="model.language_model.bunny_qwen BunnyQwen2Config BunnyQwen2ForCausalLM",
        options={"vocab_size": 22},  # its loader adds no token
        absent=("xformers",),
        name="bunny-tiny",
        training="--model_type qwen1.5-1.8b",
        loading={"device": "cpu", "model_type": "qwen1.5-1.8b"},
    ),
    Fork(
        title="Cambrian",
        folder="cambrian",
        commit="539ffc3",
        package="cambrian",
        classes="model.language_model.cambrian_llama CambrianConfig CambrianLlamaForCausalLM",
        initial=CAMBRIAN,
        name="cambrian-tiny",
        call=lambda samples: {"image_sizes": [(64, 64)] * samples},
        shown=lambda pixels: [pixels],
    ),
    Fork(
        title="LLaVA-HR",
        folder="LLaVA-HR",
        commit="1212ffb",
        package="llava_hr",
        classes="model.language_model.llava_llama LlavaConfig LlavaLlamaForCausalLM",
        absent=("xformers",),
        initial={"is_multipath_encoder": False},
        training="",
    ),
    Fork(
        title="MoE-LLaVA",
        folder="MoE-LLaVA",
        commit="6cb5f66",
        package="moellava",
        classes="model.language_model.llava_llama LlavaLlamaConfig LlavaLlamaForCausalLM",
        initial={
            "image_tower": fork_world.TOWER,
            "video_tower": None,
            "image_projector_type": "mlp2x_gelu",
            "video_projector_type": "linear",
        },
    ),
    Fork(
        title="TinyLLaVA",
        folder="TinyLLaVA_Factory",
        commit="53f12c7",
        package="tinyllava",
        classes="model.modeling_tinyllava TinyLlavaConfig TinyLlavaForConditionalGeneration",
        build=_tinyllava,
        load=_of_class,
    ),
    Fork(
        title="prismatic",
        folder="prismatic-vlms",
        commit="874c5bb",
        package="prismatic",
        classes="",
        build=_prismatic,
        loads=False,
        generates=False,
    ),
)
