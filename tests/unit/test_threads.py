"""What threads share gives each of them what it gives one alone, from the first call on."""

import copy
import gc
import logging
import pickle
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tests import builders
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffenc import CrossAttnScorer, DiffusionEncoder, EncoderConfig
from diffenc.denoiser.attention import CrossAttnTaps, cross_attentions, word_token_positions
from diffenc.denoiser.attention_scores import read_queries
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.lora.adapters import lora_disabled
from diffenc.denoiser.shortening import shortened
from diffenc.inputs.latents import encode_posterior
from diffenc.inputs.prompts import tokenize
from diffenc.models import StableDiffusion, load_backbone
from diffenc.runtime.threads import lock_of, without_warnings
from diffenc.storage.pretrained import load_whole, pretrained_source

TAPS = ("up_blocks.0", "mid_block")


@contextmanager
def frequent_switches():
    """Threads take turns a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(number)` in threads that start together; raise what the first one raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))


def tiny_parts() -> dict[str, Any]:
    return {
        "unet": builders.tiny_unet(),
        "vae": builders.tiny_vae(),
        "scheduler": DDPMScheduler(**builders.NOISE_SCHEDULE),
        "text_encoder": builders.tiny_text_encoder(),
        "tokenizer": builders.tiny_tokenizer(pad_token="!"),
    }


def tiny_backbone(**parts: Any) -> StableDiffusion:
    return StableDiffusion(name="tiny", default_size=16, **{**tiny_parts(), **parts})


def tiny_clip() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    return builders.seeded(lambda: CLIPVisionModelWithProjection(config))


class Entries:
    """Every way into one model: encoders, a captioner, a scorer, words and tokens.

    Each call has one picture and one text: rows of a larger batch are rounded differently.
    """

    def __init__(self) -> None:
        backbone = tiny_backbone()
        other = tiny_backbone(unet=backbone.unet, tokenizer=backbone.tokenizer)
        config = EncoderConfig(taps=TAPS)
        self.encoder = DiffusionEncoder(backbone, config)
        self.other = DiffusionEncoder(other, EncoderConfig(taps=("mid_block",), timestep=261))
        long = EncoderConfig(taps=TAPS[:1], long_prompts="chunk")
        self.chunked = DiffusionEncoder(backbone, long)
        self.captioned = DiffusionEncoder(tiny_backbone(), config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.captioned.add_captioner(tiny_clip())
        with torch.no_grad():
            self.captioned.captioner.gate.fill_(0.5)
        self.captioned.requires_grad_(False)
        self.scorer = CrossAttnScorer.from_pretrained(
            other, token_mask="content", timesteps=(189,), calibration=None
        )

    def call(self, index: int) -> list[Tensor]:
        """The outputs of a call; `index` says which entry, picture and text."""
        kind, seed = index % 8, index // 8
        image = picture(seed % 3)
        words = ["red", "blue", "circle", "square", "photo", "left"]
        text = " ".join(["a", *(words[(seed // 6**place) % 6] for place in range(4)), str(seed)])
        if kind == 0:
            return [self.encoder(image, text)]
        if kind == 1:
            return [self.other(image, text)]
        if kind == 2:
            return [self.chunked(image, f"{text} " * (1 + seed % 20))]
        if kind == 3:
            return [self.captioned(image, text)]
        if kind == 4:
            return [self.scorer(image, text)]
        if kind == 5:
            return [
                torch.tensor(m.array) for m in self.scorer.word_maps(image, text, ["a"]).values()
            ]
        tokenizer = self.encoder.backbone.tokenizer
        if kind == 6:
            return [torch.tensor(word_token_positions(tokenizer, text, str(seed)))]
        ids, cut = tokenize(tokenizer, [f"{text} " * (1 + seed % 20), text])
        return [ids, torch.tensor(cut)]


def differences(calls: Sequence[int], threads: int) -> list[int]:
    """Calls that give something else, or an error, in threads than in one, both from the start."""
    alone = Entries()
    wanted = {index: alone.call(index) for index in calls}
    shared = Entries()
    wrong: list[int] = []

    def work(number: int) -> None:
        for index in calls[number::threads]:
            try:
                outputs = shared.call(index)
            except Exception:
                wrong.append(index)
                continue
            same = len(outputs) == len(wanted[index]) and all(
                one.equal(other) for one, other in zip(outputs, wanted[index], strict=True)
            )
            if not same:
                wrong.append(index)

    in_threads(threads, work)
    # What was remembered meanwhile is right too.
    again = [index for index in calls[:64] if index not in wrong]
    for index in again:
        pairs = zip(shared.call(index), wanted[index], strict=True)
        if not all(one.equal(other) for one, other in pairs):
            wrong.append(index)
    return wrong


@pytest.mark.long
def test_mixed_calls_of_eight_threads_equal_those_of_one_from_a_cold_start():
    assert differences(range(64), 8) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eight_threads_of_two_thousand_mixed_calls_equal_one():
    assert differences(range(16_000), 8) == []


def test_prompts_of_many_threads_are_whole():
    tokenizer, alone = (builders.tiny_tokenizer(pad_token="!") for _ in range(2))
    texts = [f"a red circle {'blue ' * (index % 90)}{index}" for index in range(120)]
    wanted = {text: tokenize(alone, [text])[0] for text in texts}

    def work(number: int) -> None:
        for text in texts[number % 2 :: 2]:
            assert tokenize(tokenizer, [text])[0].equal(wanted[text])
            assert word_token_positions(tokenizer, text, "red") == (2,)

    in_threads(8, work)


def test_encoders_on_one_unet_take_turns():
    unet = builders.tiny_unet()
    encoders = [
        DiffusionEncoder(tiny_backbone(unet=unet), EncoderConfig(taps=(tap,))) for tap in TAPS
    ]
    wanted = [encoder(picture()) for encoder in encoders]
    assert encoders[0].backbone.lock is encoders[1].backbone.lock is lock_of(unet)

    def work(number: int) -> None:
        encoder = encoders[number % 2]
        for _ in range(4):
            encoder.clear_cache()
            assert encoder(picture()).equal(wanted[number % 2])

    in_threads(4, work)


def test_the_lock_is_the_modules_and_a_copys_is_its_own():
    unet = builders.tiny_unet()
    backbone = tiny_backbone(unet=unet)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert twin.lock is not backbone.lock
        assert twin.lock is lock_of(twin.unet)
    assert lock_of(shortened(unet, ["mid_block"])) is lock_of(unet)  # it has the same blocks
    backbone.unet = builders.tiny_unet()
    assert backbone.lock is not lock_of(unet)


def test_a_lock_does_not_keep_its_object():
    module = nn.Linear(1, 1)
    lock_of(module)
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


def run_elsewhere(unet: nn.Module) -> Tensor:
    """A plain pass of another program's thread, which knows nothing of locks."""
    found: list[Tensor] = []

    def call() -> None:
        states = torch.ones(1, 5, 8)
        with torch.no_grad():
            found.append(unet(torch.ones(1, 4, 8, 8), 10, states).sample)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found, "the other thread's pass was broken off"
    return found[0]


def test_hooks_leave_the_passes_of_other_threads_alone():
    unet = builders.tiny_unet()
    wanted = run_elsewhere(unet)
    inputs = (torch.zeros(2, 4, 8, 6), 3, torch.zeros(2, 5, 8))
    tap = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"

    def read() -> dict[str, Tensor]:
        with torch.no_grad():
            unet(*inputs)
        return {}

    with ForwardTaps(unet, [tap, "mid_block"], early_exit=True) as taps:
        assert run_elsewhere(unet).equal(wanted)
        maps = taps.run(read)
        assert run_elsewhere(unet).equal(wanted)
        assert [taps[name].equal(maps[name]) for name in maps] == [True, True]
    with CrossAttnTaps(unet, tokens=[1]) as taps, torch.no_grad():
        unet(*inputs)
        before = taps.maps()
        run_elsewhere(unet)
        assert all(taps.maps()[name] is before[name] for name in before)

    def query() -> None:
        assert run_elsewhere(unet).equal(wanted)
        read()

    assert {len(rows) for rows in read_queries(cross_attentions(unet), query).values()} == {2}


class PausingScheduler:
    """A scheduler that calls `pause` between what is looked up and what is computed."""

    def __init__(self) -> None:
        self._inner = DDPMScheduler(**builders.NOISE_SCHEDULE)
        self.config = self._inner.config
        self.pause: Callable[[], object] = lambda: None

    @property
    def alphas_cumprod(self) -> Tensor:
        self.pause()
        return self._inner.alphas_cumprod


def test_a_call_sees_one_adapter_and_remembers_what_that_gave():
    scheduler = PausingScheduler()
    encoder = DiffusionEncoder(tiny_backbone(scheduler=scheduler), EncoderConfig(taps=TAPS))
    plain = encoder(picture())
    encoder.add_lora(rank=2)
    with torch.no_grad():
        for path, parameter in encoder.named_parameters():
            if "lora_B" in path:
                parameter.fill_(0.3)
    encoder.set_lora("default", trainable=False)
    adapted = encoder(picture())
    assert not plain.equal(adapted)
    encoder.clear_cache()
    switching = threading.Thread(target=encoder.set_lora, args=(None,))

    def switch() -> None:
        scheduler.pause = lambda: None
        switching.start()
        switching.join(0.2)

    scheduler.pause = switch
    assert encoder(picture()).equal(adapted)
    switching.join()
    assert encoder(picture()).equal(plain)
    encoder.set_lora("default")
    assert encoder(picture()).equal(adapted)


def test_others_wait_while_adapters_are_off():
    encoder = DiffusionEncoder(tiny_backbone(), EncoderConfig(taps=TAPS))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (encoder(picture()), done.set()))
    with lora_disabled(encoder.backbone.unet):
        thread.start()
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()


def test_a_vae_that_is_brought_to_float32_is_seen_whole():
    vae = builders._vae(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, force_upcast=True
    )
    pixel_values = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    reference = copy.deepcopy(vae).half().float()
    wanted, _ = encode_posterior(reference, pixel_values)
    vae.half()
    with torch.no_grad():
        for one, other in zip(vae.parameters(), reference.parameters(), strict=True):
            one.copy_(other)

    def slowly(dtype: torch.dtype) -> None:
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
            time.sleep(1e-3)

    vae.to = slowly
    in_threads(4, lambda _: _equal(encode_posterior(vae, pixel_values)[0], wanted))


def _equal(found: Tensor, wanted: Tensor) -> None:
    assert found.equal(wanted)


def test_two_backbones_share_a_tokenizer():
    tokenizer = builders.tiny_tokenizer()
    backbones = [tiny_backbone(tokenizer=tokenizer) for _ in range(2)]
    wanted = backbones[0].embed(["a red circle"], size=(16, 16)).prompt_embeds

    def work(number: int) -> None:
        for index in range(16):
            embeds = backbones[number % 2].embed(["a red circle"], size=(16, 16))
            assert embeds.prompt_embeds.equal(wanted)
            (cut,) = tokenize(tokenizer, ["blue " * (index + 68)])[1]
            assert cut == max(0, index + 70 - 77)

    in_threads(6, work)


@pytest.mark.long
def test_loading_in_threads_leaves_the_defaults_and_the_verbosity_of_the_process(tiny_sd_folder):
    from transformers import CLIPModel
    from transformers.utils import logging as library

    verbosity, dtype = library.get_verbosity(), torch.get_default_dtype()
    clip = pretrained_source("shapes-clip")
    dtypes = [torch.float16, torch.float32, torch.bfloat16]
    loaded = []

    def work(number: int) -> None:
        loaded.append(load_backbone(tiny_sd_folder, dtype=dtypes[number % 3]).dtype)
        load_whole(CLIPModel, clip)

    in_threads(3, work)
    assert sorted(map(str, loaded)) == sorted(map(str, dtypes))
    assert (library.get_verbosity(), torch.get_default_dtype()) == (verbosity, dtype)
    assert not any(handler.filters for handler in logging.getLogger("transformers").handlers)


def test_warnings_are_silenced_and_no_filter_stays():
    before = list(warnings.filters)

    def work(_: int) -> None:
        for _ in range(20):
            with without_warnings("a known"):
                warnings.warn("a known remark", stacklevel=1)

    in_threads(4, work)
    assert warnings.filters == before
