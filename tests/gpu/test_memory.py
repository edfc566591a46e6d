"""What the encoder holds on a GPU, and what becomes of a batch that does not fit."""

import gc
import warnings
from contextlib import contextmanager

import pytest
import torch

from diffenc import DiffusionEncoder

pytestmark = pytest.mark.gpu

ROWS = 48
TAP = "up_blocks.1"


@pytest.fixture
def load(narrow_folder, device):
    def load(**options):
        defaults = {"taps": (TAP,), "size": 512, "use_cache": False}
        return DiffusionEncoder.from_pretrained(
            narrow_folder, device=device, dtype=torch.float16, **{**defaults, **options}
        )

    yield load
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def picture():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 512, 512), generator=generator, dtype=torch.uint8)


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_of(call):
    """Most bytes that tensors took beyond those at the beginning, and the result."""
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def reserved_by(call):
    """Most bytes that the allocator asked the device for."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved(), result


@contextmanager
def at_most(limit):
    """Let this process have no more than `limit` bytes of the device."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_batch_size_bounds_the_memory_of_a_call(load, picture):
    at_once, expected = peak_of(lambda: load(draws=ROWS).extract(picture))
    in_parts, found = peak_of(lambda: load(draws=ROWS, batch_size=2).extract(picture))
    assert in_parts < at_once / 2
    limit = 0.02 * float(expected[TAP].abs().max())
    torch.testing.assert_close(found[TAP], expected[TAP], rtol=0, atol=limit)


def test_nothing_is_left_after_calls_without_caches(load, picture):
    encoder = load()
    encoder.extract(picture, "a red circle", conditioning="cfg")
    before = allocated()
    for index in range(3):
        encoder.extract(picture, f"question {index}", conditioning="cfg")
    assert allocated() == before


def test_caches_hold_no_more_than_they_count(load, picture):
    encoder = load(use_cache=True)
    encoder.extract(picture, "a red circle", conditioning="cfg")  # kernels load their workspaces
    encoder.clear_cache()
    before = allocated()
    for index in range(4):
        encoder.extract(picture + index, f"question {index}", conditioning="cfg")
    caches = encoder.backbone.caches
    every = (caches.latents, caches.prompts, caches.features, caches.outputs)
    counted = sum(cache.nbytes for cache in every)
    assert counted > 0
    # Each tensor is rounded up to a block of the allocator, of 512 bytes.
    assert allocated() - before <= counted + 512 * 64
    encoder.clear_cache()
    assert allocated() - before <= 512 * 64


def test_no_graph_is_kept_without_something_to_train(load, picture):
    features = load().extract(picture, "a red circle")
    assert features[TAP].grad_fn is None


def test_a_truncated_encoder_takes_less_memory(load, picture):
    def loaded(truncate):
        before = allocated()
        encoder = load(truncate=truncate)
        size = allocated() - before
        return size, encoder.extract(picture, "a red circle")[TAP]

    whole, expected = loaded(truncate=False)
    short, found = loaded(truncate=True)
    assert short < whole
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_a_batch_that_does_not_fit_is_split_with_one_warning(load, picture):
    encoder = load(draws=ROWS)
    encoder.extract(picture)  # kernels load their workspaces
    at_once, expected = reserved_by(lambda: encoder.extract(picture))
    few = load(draws=ROWS, batch_size=4)
    in_parts, _ = reserved_by(lambda: few.extract(picture))
    assert in_parts < 0.7 * at_once
    with at_most((in_parts + at_once) / 2), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = encoder.extract(picture)
    assert len([each for each in told if "did not fit" in str(each.message)]) == 1
    limit = 0.02 * float(expected[TAP].abs().max())
    torch.testing.assert_close(found[TAP], expected[TAP], rtol=0, atol=limit)


def test_an_encoder_works_again_after_memory_ran_out_for_one_row(load, picture):
    encoder = load()
    expected = encoder.extract(picture, "a red circle")[TAP]
    hooked = [module for module in encoder.modules() if module._forward_hooks]
    with at_most(allocated() + 2**20), pytest.raises(torch.cuda.OutOfMemoryError):
        encoder.extract(picture, "a red circle")
    assert [module for module in encoder.modules() if module._forward_hooks] == hooked
    assert torch.equal(encoder.extract(picture, "a red circle")[TAP], expected)
