"""Fixtures for all tests: tiny seeded stand-ins for real models, built without network."""

import gc
import os

# Both are read once, when the library behind them is loaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on busy cores spinning takes 80 times longer

import cpu_torchvision  # noqa: F401  # before all that imports torchvision

# isort: split
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

import builders
from shapes_tools import shapes_tools

torch.set_num_threads(2)  # the same order of sums on every machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not torch.cuda.is_available():
        skipped["gpu"] = "needs a CUDA device"
    if config.getoption("--jaxtyping-packages", default=None):
        skipped["wrong_type"] = "annotations are checked before the library can answer"
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):  # keywords hold the ids of parameters too
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Spare the collector what lives as long as the tests: a million objects of imported modules.

    A pass over them takes a third of a second, and every training asks for one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def tiny_unet() -> UNet2DConditionModel:
    """SD2-shaped U-Net of two levels: 17k parameters, for 8-channel text states."""
    return builders.tiny_unet()


@pytest.fixture(scope="session")
def tiny_vae() -> AutoencoderKL:
    """VAE of two levels: a 16 x 16 image becomes 8 x 8 latents, the size of `tiny_unet`."""
    return builders.tiny_vae()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP tokenizer that keeps a few words whole and spells all others."""
    return builders.tiny_tokenizer()


@pytest.fixture(scope="session")
def shapes_tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer of the miniature language models."""
    from diffenc.mllm.language import load_language_model

    return load_language_model("shapes-lm")[1]


@pytest.fixture(scope="session")
def extended_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the miniature whose tokenizer has a token for each noun of the little pictures."""
    from diffenc.models.shapes import shapes_folder

    folder = tmp_path_factory.mktemp("extended") / "model"
    shutil.copytree(shapes_folder(), folder)
    with shapes_tools("extend_tokenizer") as tools:
        tools["extend_tokenizer"].extend(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_encoder() -> CLIPTextModel:
    """CLIP text model for `tiny_tokenizer`, with the 8 channels that `tiny_unet` attends to."""
    return builders.tiny_text_encoder()


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a diffusers pipeline in the shape of Stable Diffusion 1.5, at 64 pixels."""
    return builders.save_sd(tmp_path_factory.mktemp("tiny-sd"), "sd1.5")


@pytest.fixture(scope="session")
def tiny_sd21_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in the shape of Stable Diffusion 2.1-base: linear projections, heads per level."""
    return builders.save_sd(tmp_path_factory.mktemp("tiny-sd21-base"), "sd2.1-base")


@pytest.fixture(scope="session")
def tiny_sd21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in the shape of Stable Diffusion 2.1: as 2.1-base, but predicts v."""
    return builders.save_sd(tmp_path_factory.mktemp("tiny-sd21"), "sd2.1")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in the shape of SDXL: two text encoders, pooled text and time ids."""
    return builders.save_sdxl(tmp_path_factory.mktemp("tiny-sdxl"))
