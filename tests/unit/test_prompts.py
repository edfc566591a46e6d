from dataclasses import replace

import pytest
import torch

from diffenc.errors import PromptError, ShapeError
from diffenc.inputs.prompts import PromptEmbeds, match_batch, tokenize


def embeds(rows: int) -> PromptEmbeds:
    return PromptEmbeds(
        torch.arange(rows * 6.0).view(rows, 2, 3),
        torch.arange(rows * 4.0).view(rows, 4),
        torch.ones(rows, 6),
        tuple(range(rows)),
    )


def test_one_prompt_or_one_for_each():
    assert match_batch("a", 3) == ["a"]
    assert match_batch(["a", "b"], 2) == ["a", "b"]
    assert match_batch(("a",), 5) == ["a"]


@pytest.mark.parametrize("prompts", [["a", "b"], [], ["a"] * 4], ids=len)
def test_any_other_number_is_refused(prompts):
    with pytest.raises(PromptError, match=f"{len(prompts)} prompts, 3 images"):
        match_batch(prompts, 3)


@pytest.mark.wrong_type
@pytest.mark.parametrize("bad", [None, 3, b"red"])
def test_what_is_no_text_is_refused(bad):
    with pytest.raises(PromptError, match="must be strings"):
        match_batch(["a", bad], 2)


def test_what_exceeds_the_limit_is_cut_and_counted(tiny_tokenizer):
    limit = tiny_tokenizer.model_max_length
    ids, truncated = tokenize(tiny_tokenizer, ["red circle", "red " * limit])
    assert ids.shape == (2, limit)
    assert truncated == (0, 2)
    assert ids[1, -1] == tiny_tokenizer.eos_token_id


def test_rows_are_repeated_kept_or_refused():
    assert embeds(1).rows(3).prompt_embeds.shape == (3, 2, 3)
    assert embeds(1).rows(3).truncated == (0, 0, 0)
    assert embeds(3).rows(3).pooled_prompt_embeds.shape == (3, 4)
    with pytest.raises(ShapeError, match="3 images need 1 prompt or 3, got 2"):
        embeds(2).rows(3)


def test_the_unet_gets_states_that_lie_in_order():
    repeated = embeds(1).rows(3)
    cut = replace(embeds(3), prompt_embeds=embeds(3).prompt_embeds[:, :1])
    for given in (repeated, cut):
        states = given.unet_kwargs()["encoder_hidden_states"]
        assert states.is_contiguous()
        assert torch.equal(states, given.prompt_embeds)


def test_concat_and_select_are_inverse():
    joined = PromptEmbeds.concat([embeds(2), embeds(1)])
    assert len(joined) == 3
    assert joined.truncated == (0, 1, 0)
    part = joined.select(0, 2)
    assert torch.equal(part.prompt_embeds, embeds(2).prompt_embeds)
    assert torch.equal(part.time_ids, embeds(2).time_ids)


def test_only_sdxl_gets_added_conditions():
    assert set(embeds(1).unet_kwargs()["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert "added_cond_kwargs" not in PromptEmbeds(torch.zeros(1, 2, 3)).unet_kwargs()
