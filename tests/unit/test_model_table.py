"""The table of models says what the library knows of them."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

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
    assert rows.count("| `") == 2 * len(table.LICENCES) + rows.count(" | `")
    for alias, licence in table.LICENCES.items():
        assert f"| `{alias}` |" in rows
        assert licence in next(line for line in rows.splitlines() if f"`{alias}`" in line)


def test_the_score_is_that_of_the_results_page():
    page = (table.PAGE.parent / "results" / "winoground-shapes.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "denoising-gap" in line]
    assert any(table.SCORES["shapes"] in line for line in lines)


@pytest.mark.long
def test_arithmetic_and_size_are_those_that_were_counted_before(rows):
    line = next(line for line in rows.splitlines() if line.startswith("| `sdxl`"))
    assert "2,567.5" in line
    assert "| 1,588.8 |" in line
