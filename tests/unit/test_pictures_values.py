import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import ImageError, RangeWarning
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.pictures import values as subject
from marks import wrong_type

OPTIONS = {"size": None, "resize": "none", "multiple": 1}
TO_TENSOR = torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)
BYTES = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
EXPECTED = torch.from_numpy(BYTES).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(subject, "_warned", False)


def read(image):
    return to_pixel_values(image, **OPTIONS)


def warned_of(*calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            read(call)
    return [each for each in caught if each.category is RangeWarning]


@pytest.mark.parametrize(
    "images",
    [TO_TENSOR, TO_TENSOR[None].repeat(3, 1, 1, 1), [TO_TENSOR, TO_TENSOR * 0.5], [TO_TENSOR[:1]]],
    ids=["one", "batch", "list", "grey"],
)
def test_what_to_tensor_gives_is_warned_of_once(images):
    (warning,) = warned_of(images, images, TO_TENSOR)
    assert "images * 2 - 1" in str(warning.message)
    assert warning.filename == __file__
    assert issubclass(RangeWarning, UserWarning)


@pytest.mark.parametrize(
    "images",
    [
        TO_TENSOR * 2 - 1,
        [TO_TENSOR, TO_TENSOR * 2 - 1],  # a list counts as one
        torch.stack([TO_TENSOR, -TO_TENSOR]),
        torch.zeros(3, 8, 8),  # of one colour: a dummy, or grey
        torch.ones(2, 3, 8, 8),
        torch.randint(128, 256, (3, 8, 8)) / 127.5 - 1,  # a bright picture of 8 bits
        torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8),
        np.random.default_rng(0).random((8, 8, 3)),
        Image.fromarray(BYTES),
    ],
    ids=map(str, range(9)),
)
def test_other_pictures_are_not_warned_of(images):
    assert not warned_of(images)


@pytest.mark.long
def test_it_is_once_in_a_process_whatever_the_filters_say():
    code = """
        import torch
        from diffenc.inputs.images import to_pixel_values
        for _ in range(3):
            to_pixel_values(torch.rand(3, 8, 8), size=8)
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("RangeWarning") == 1
    assert done.stderr.startswith("<string>:5: RangeWarning")


def test_steps_inside_do_not_warn_of_their_own_values():
    bright = np.random.default_rng(0).integers(140, 250, (20, 40, 3), dtype=np.uint8)
    from diffenc.clip.vision_models import to_image, to_pictures

    assert not warned_of(bright, to_image(read(bright)[0]), to_pictures(bright))


@pytest.mark.parametrize(
    "array",
    [
        BYTES,
        BYTES[::-1][::-1],
        np.asfortranarray(BYTES),
        np.repeat(BYTES, 2, axis=1)[:, ::2],
        BYTES.astype(">u2") * 257,
        BYTES.astype("<u2") * 257,
        BYTES / 255,
        (BYTES / 255).astype(">f4"),
        (BYTES / 255).astype(np.longdouble),
        np.ma.masked_array(BYTES, mask=False),
    ],
    ids=map(str, range(10)),
)
def test_layout_and_byte_order_change_nothing(array):
    frozen = array.copy() if array.flags.owndata else array
    frozen.flags.writeable = False
    torch.testing.assert_close(read(frozen)[0], EXPECTED, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_floats_and_with_gradients(dtype):
    values = (TO_TENSOR * 2 - 1).to(dtype).requires_grad_()
    pixels = read(values)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0], values.detach().float())
    pixels.sum().backward()
    assert values.grad is not None


def test_eight_bit_floats_are_read():
    values = (TO_TENSOR * 2 - 1).to(torch.float8_e4m3fn)
    torch.testing.assert_close(read(values)[0], values.float())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (BYTES.astype(np.uint16), r"uint16 array lie in \[0, 104\].*nearly black.*uint8"),
        (BYTES.astype(np.int64), r"float, got int64.*astype\(np.uint8\)"),
        (BYTES.astype(np.int32), "float, got int32"),
        (BYTES.astype(np.uint32), "float, got uint32"),
        (BYTES.astype(np.int8), "float, got int8"),
        (BYTES > 3, r"got bool; multiply by 255"),
        (BYTES.astype(np.complex64), "got complex64"),
        (BYTES.astype(np.float32), "divide by 255"),
        (BYTES / 127.5 - 1, "add 1 and halve"),
        (np.full((4, 4, 3), 1e300), "NaN or infinity"),
        (np.ma.masked_equal(BYTES, 3), "masked values; fill them"),
        (np.moveaxis(BYTES, -1, 0), r"got \(3, 5, 7\).*np\.moveaxis\(array, 0, -1\)"),
        (BYTES[:, :, :2], r"\(height, width\[, 1 \| 3 \| 4\]\)"),
        (np.zeros(3, np.uint8), "must be"),
        (np.array([[BYTES]], dtype=object), "must be"),
        (torch.from_numpy(BYTES), r"\(3, height, width\), got \(5, 7, 3\).*permute\(2, 0, 1\)"),
        (EXPECTED.permute(1, 2, 0), r"got \(5, 7, 3\).*pass tensor\.permute\(2, 0, 1\)"),
        (EXPECTED[0], r"got \(5, 7\); arrays are"),
        (EXPECTED.to_sparse(), "plain values"),
        (EXPECTED.to("meta"), "plain values, got one that is meta"),
        (EXPECTED.int(), "uint8 or float"),
        (EXPECTED > 0, "uint8 or float"),
        (EXPECTED.to(torch.complex64), "uint8 or float"),
        (Image.fromarray(BYTES[..., 0].astype(np.int32)), "mode 'I', lie in .*nearly black"),
        (Image.fromarray(BYTES[..., 0].astype(np.uint16)), "mode 'I;16', lie in .*nearly black"),
        (Image.fromarray(BYTES[..., 0].astype(np.float32)), r"allowed is \[0, 1\]"),
        wrong_type([[BYTES, BYTES]], "got list"),
        wrong_type([BYTES, None], "image 1 of 2: .*got NoneType"),
        wrong_type([float("nan")], "got float"),
    ],
    ids=map(str, range(29)),
)
def test_values_that_are_unclear_or_no_picture_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        read(image)


def test_sixteen_bits_that_bytes_would_not_hold_keep_their_range():
    values = np.linspace(0, 65535, 63).reshape(7, 9).astype(np.uint16)
    expected = torch.from_numpy(values.astype(np.float64) / 32767.5 - 1).float()
    for image in (values, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        torch.testing.assert_close(read(image)[0, 0], expected, rtol=0, atol=1 / 255)
    for image in (np.zeros((4, 4), np.uint16), Image.new("I", (4, 4))):
        assert (read(image) == -1).all()  # black in every reading


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 1, 3), (1, 7), (5, 7, 4)], ids=str)
def test_shapes_of_arrays(shape):
    levels = np.full(shape, 100, np.uint8)
    height, width = shape[:2]
    values = read(levels)
    assert values.shape == (1, 3, height, width)
    alpha = 100 / 255 if shape[-1] == 4 else 1
    expected = (100 / 255 * alpha + 1 - alpha) * 2 - 1
    torch.testing.assert_close(values, torch.full_like(values, expected), rtol=0, atol=1e-5)


def test_a_column_of_a_table_is_a_list(tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    names = np.array([str(tmp_path / "a.png")] * 2)
    pictures = np.empty(2, dtype=object)
    pictures[:] = [Image.fromarray(BYTES), BYTES]
    for column in (names, names.astype(object), pictures):
        assert torch.equal(read(column), EXPECTED[None].expand(2, -1, -1, -1))
