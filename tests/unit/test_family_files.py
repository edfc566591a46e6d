"""Which family a model is of, by the components that it has."""

import pytest

from diffenc.models.configs import Architecture
from diffenc.models.families import FAMILIES
from diffenc.models.family_files import FAMILY_FILES, PARTS, PIPELINES, family_of_configs

SD = ("unet", "vae", "text_encoder", "scheduler")


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (SD, "sd"),
        ((*SD, "text_encoder_2"), "sdxl"),
        (("unet", "vae"), "sd"),
        ((), "sd"),
        (("transformer", "vae", "text_encoder"), "pixart"),
    ],
)
def test_components_tell_the_family(names, family):
    configs = {name: {} for name in names}
    assert family_of_configs(configs) == family
    assert Architecture(configs).family == family


def test_a_family_that_shares_components_is_named():
    assert Architecture({name: {} for name in SD}, own_family="other").family == "other"


def test_every_class_of_a_family_has_its_files():
    assert FAMILIES.keys() == FAMILY_FILES.keys()
    for files in FAMILY_FILES.values():
        assert {*files.weighty} < {*files.parts} <= {*PARTS}
        assert {PIPELINES[kind] for kind in files.pipelines} == {files.family}


@pytest.mark.parametrize(
    ("index", "options"),
    [({}, True), ({"force_zeros_for_empty_prompt": False}, False), ({"other": 1}, True)],
)
def test_options_are_read_from_the_index(index, options):
    assert FAMILY_FILES["sdxl"].options_in(index) == {"force_zeros": options}
    assert FAMILY_FILES["sd"].options_in(index) == {}
