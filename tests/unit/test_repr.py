"""What an encoder and a scorer print of themselves: a few lines that say what they do."""

from dataclasses import replace

import pytest
import torch

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.models import load_backbone
from diffenc.scorer import CrossAttnScorer


@pytest.mark.long
def test_an_encoder_shows_what_it_reads_and_where(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps="up_blocks.1", timestep=(50, 100), conditioning="cfg", seed=3
    )
    assert repr(encoder).split("\n") == [
        "DiffusionEncoder(",
        f"  model={str(tiny_sd_folder)!r},",
        "  taps=('up_blocks.1',),",
        "  timestep=(50, 100),",
        "  conditioning='cfg',",
        "  device='cpu',",
        "  dtype=float32,",
        "  seed=3,",
        ")",
    ]
    encoder.add_lora(rank=2)
    encoder.add_captioner("shapes-clip")
    shown = repr(encoder.to(dtype=torch.bfloat16))
    assert "lora=('default',)" in shown
    assert "captioner=True" in shown
    assert "dtype=bfloat16" in shown


def test_a_scorer_shows_its_layers_in_short(tiny_sd_folder):
    scorer = CrossAttnScorer.from_pretrained(tiny_sd_folder, mode="shared-query")
    shown = repr(scorer)
    assert "mode='shared-query'" in shown
    assert f"# {len(scorer.layers)}" in shown
    assert scorer.layers[-1] in shown
    assert shown.count("\n") < 20


def test_a_model_is_one_line(tiny_sdxl_folder):
    backbone = load_backbone(tiny_sdxl_folder)
    expected = f"StableDiffusionXL({str(tiny_sdxl_folder)!r}, device='cpu', dtype=float32)"
    assert repr(backbone) == expected


def test_a_config_that_is_none_is_refused_when_it_is_set(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    scorer = CrossAttnScorer(encoder.backbone)
    for each in (encoder, scorer):
        with pytest.raises(ConfigError, match=r"dataclasses\.replace"):
            each.config = {"timestep": 10}
        each.config = replace(each.config, draws=2)
        assert each.config.draws == 2
