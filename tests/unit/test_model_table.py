"""The table of models says what the library knows of them."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from diffenc.models import list_backbones

TOOL = Path(__file__).parents[2] / "tools" / "model_table.py"
_spec = spec_from_file_location("model_table", TOOL)
table = module_from_spec(_spec)
_spec.loader.exec_module(table)


@pytest.fixture(scope="module")
def rows():
    return table.table()


@pytest.mark.long
def test_the_page_of_models_holds_the_table_that_the_tool_makes(rows):
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.BEGIN + rows + table.END in page


@pytest.mark.long
def test_every_alias_has_a_row_with_its_licence(rows):
    known = list_backbones()
    assert rows.count("| `") == 2 * len(known) + rows.count(" | `")
    for source in known:
        line = next(line for line in rows.splitlines() if f"| `{source.alias}` |" in line)
        assert f"| {source.licence} |" in line


@pytest.mark.parametrize(
    ("alias", "licence"),
    [
        ("shapes", "Apache-2.0"),
        ("sdxl", "CreativeML Open RAIL++-M"),
        ("flux-schnell", "Apache-2.0"),
        ("flux-dev", "FLUX.1-dev, not commercial"),
    ],
)
def test_weights_have_their_own_licences(alias, licence):
    assert next(each for each in list_backbones() if each.alias == alias).licence == licence


def test_the_score_is_that_of_the_results_page():
    page = (table.PAGE.parent / "results" / "winoground-shapes.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "denoising-gap" in line]
    assert any(table.SCORES["shapes"] in line for line in lines)


@pytest.mark.long
def test_arithmetic_and_size_are_those_that_were_counted_before(rows):
    line = next(line for line in rows.splitlines() if line.startswith("| `sdxl`"))
    assert "2,567.5" in line
    assert "| 1,588.8 |" in line
