"""What code reads outside of a model's own attributes may change between two calls as well.

Settings of classes, closures, defaults, slots, names of modules, functions that a program puts in
the place of torch's, and writes that autograd does not count. As in `test_stale_caches`, the
answer is compared with that of an encoder which remembers nothing.
"""

import copy
import types
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional as F

from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.memory.model_state import module_key
from state_builders import TAPS, TEXT, picture, stirred, tiny_backbone

GLOBAL_FACTOR = 2.0


@pytest.fixture(scope="module")
def original():
    return tiny_backbone()


@pytest.fixture
def backbone(original):
    return copy.deepcopy(original)


class ByClass(AttnProcessor):
    factor = 2.0

    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * self.factor


class BySlot:
    __slots__ = ("factor", "inner")

    def __init__(self):
        self.inner, self.factor = AttnProcessor(), 2.0

    def __call__(self, *args, **options):
        return self.inner(*args, **options) * self.factor


def global_factor():
    return GLOBAL_FACTOR


class ByGlobal(AttnProcessor):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * global_factor()


class ByMapping(AttnProcessor):
    def __init__(self, factors):
        super().__init__()
        self.factors = types.MappingProxyType(factors)

    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * self.factors["factor"]


def processor(make, change):
    """A processor is put in, and a change follows."""

    def prepare(backbone, patch):
        known = make()
        backbone.unet.set_attn_processor(known)
        return lambda: change(known, patch)

    return prepare


def setting_of_a_class(_known, patch):
    patch.setattr(ByClass, "factor", 3.0)


def slot(known, _patch):
    known.factor = 3.0


def name_of_a_module(_known, patch):
    patch.setitem(globals(), "GLOBAL_FACTOR", 3.0)


def closure(backbone, _patch):
    forward, factors = backbone.unet.mid_block.forward, {"factor": 2.0}

    def scaled(*args, **options):
        return forward(*args, **options) * factors["factor"]

    backbone.unet.mid_block.forward = scaled
    return lambda: factors.update(factor=3.0)


def default(backbone, _patch):
    forward = backbone.unet.mid_block.forward

    def scaled(*args, factor=2.0, **options):
        return forward(*args, **options) * factor

    backbone.unet.mid_block.forward = scaled
    return lambda: scaled.__kwdefaults__.update(factor=3.0)


def bound_argument(backbone, _patch):
    forward = backbone.unet.mid_block.forward

    def scaled(*args, factor, **options):
        return forward(*args, **options) * factor

    bound = partial(scaled, factor=2.0)
    backbone.unet.mid_block.forward = bound
    return lambda: bound.keywords.update(factor=3.0)


def method_of_a_class(_backbone, patch):
    encode = AutoencoderKL.encode
    halved = lambda self, values, **options: encode(self, values * 0.5, **options)  # noqa: E731
    return lambda: patch.setattr(AutoencoderKL, "encode", halved)


def method_that_a_processor_calls(backbone, patch):
    backbone.unet.set_attn_processor(AttnProcessor())
    read = Attention.get_attention_scores
    sharp = lambda self, query, *others: read(self, 2 * query, *others)  # noqa: E731
    return lambda: patch.setattr(Attention, "get_attention_scores", sharp)


def method_of_torch(_backbone, patch):
    convolve = nn.Conv2d._conv_forward
    larger = lambda self, *args: convolve(self, *args) * 1.1  # noqa: E731
    return lambda: patch.setattr(nn.Conv2d, "_conv_forward", larger)


def attention_of_torch(_backbone, patch):
    attend = F.scaled_dot_product_attention
    larger = lambda *args, **options: attend(*args, **options) * 1.1  # noqa: E731
    return lambda: patch.setattr(F, "scaled_dot_product_attention", larger)


def averaged_weights(backbone, _patch):
    average = EMAModel(list(stirred(backbone.unet).parameters()))
    return lambda: average.copy_to(backbone.unet.parameters())


def view_of_numpy(backbone, _patch):
    values = backbone.text_encoder.get_input_embeddings().weight.detach().numpy()
    return lambda: values.__imul__(1.1)


CHANGES = {
    "setting of a class": processor(ByClass, setting_of_a_class),
    "slot": processor(BySlot, slot),
    "name of a module": processor(ByGlobal, name_of_a_module),
    "mapping": lambda backbone, _patch: (
        (factors := {"factor": 2.0}),
        backbone.unet.set_attn_processor(ByMapping(factors)),
        lambda: factors.update(factor=3.0),
    )[-1],
    "closure": closure,
    "default": default,
    "bound argument": bound_argument,
    "method of a class": method_of_a_class,
    "method that a processor calls": method_that_a_processor_calls,
    "method of torch": method_of_torch,
    "attention of torch": attention_of_torch,
    "averaged weights": averaged_weights,
    "view of numpy": view_of_numpy,
}


def asks(backbone, *, use_cache):
    guided = DiffusionEncoder(backbone, use_cache=use_cache)
    reused = EncoderConfig(taps=TAPS[1:], reuse="middle")
    reusing = DiffusionEncoder(backbone, reused, use_cache=use_cache)
    scorer = CrossAttnScorer.from_pretrained(
        backbone, preset="paper", use_cache=use_cache, timesteps=(300,)
    )
    return [
        lambda: list(guided.extract(picture(), TEXT, conditioning="uncond").values()),
        lambda: list(reusing.extract(picture(), TEXT).values()),
        lambda: [scorer(picture(), [TEXT])],
    ]


@pytest.mark.parametrize("prepare", CHANGES.values(), ids=CHANGES)
def test_changed_code_answers_as_a_fresh_model(backbone, monkeypatch, prepare):
    change = prepare(backbone, monkeypatch)
    known = asks(backbone, use_cache=True)
    before = [ask() for ask in known]
    hits = backbone.caches.features.hits
    again = known[0]()
    assert backbone.caches.features.hits == hits + 1  # a look by itself changes nothing
    assert all(torch.equal(one, two) for one, two in zip(before[0], again, strict=True))
    change()
    fresh = [ask() for ask in asks(backbone, use_cache=False)]
    for ask, old, expected in zip(known, before, fresh, strict=True):
        for value, stale, true in zip(ask(), old, expected, strict=True):
            torch.testing.assert_close(value, true, atol=1e-6, rtol=1e-6)
            assert not torch.allclose(stale, true, atol=1e-5, rtol=1e-5)


def test_a_name_that_no_code_of_the_model_reads_changes_nothing(backbone, monkeypatch):
    backbone.unet.set_attn_processor(ByGlobal())
    before = module_key(backbone.unet)
    monkeypatch.setitem(globals(), "UNREAD", 1)
    monkeypatch.setattr(AutoencoderKL, "encode", AutoencoderKL.encode)
    assert module_key(backbone.unet) == before
