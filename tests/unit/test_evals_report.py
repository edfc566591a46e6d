import json
import statistics
from pathlib import Path

import pytest

from diffenc.errors import ConfigError
from diffenc.evals import evaluate, load_mmvp_vlm, load_winoground, shapes_benchmark
from diffenc.evals.matching.mmvp_vlm import PATTERNS
from diffenc.evals.matching.report import remarks, tables, to_dict, to_markdown
from diffenc.evals.paper import paper_page, published_source, published_table
from evals_data import ColorMatcher, RandomMatcher, mmvp_vlm, winoground_jsonl


def rows_of(table):
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def test_the_tables_show_what_was_measured():
    found = evaluate(shapes_benchmark("winoground", per_label=4), [RandomMatcher()], trials=3)
    overall, *split = tables(found)
    result = found.results("random")["image"]
    shown = rows_of(overall)
    assert shown["random"]["image"] == f"{result.mean:.1f} ± {statistics.stdev(result.trials):.1f}"
    assert shown["chance"] == {"text": "25.0", "image": "25.0", "group": "16.7"}
    assert not any(name.startswith("paper") for name in shown)
    assert [list(rows_of(table)["random"]) for table in split] == [
        ["noun", "color", "relation", "count", "size", "all"]
    ] * 3
    by_kind = rows_of(split[1])["random"]
    assert by_kind["all"] == shown["random"]["image"]
    color = found.by_label("random")["color"]["image"]
    assert by_kind["color"].startswith(f"{color.mean:.1f} ± ")


def test_the_papers_rows_stand_beside_real_data(tmp_path):
    found = evaluate(load_winoground(winoground_jsonl(tmp_path)), [ColorMatcher("color")])
    shown = rows_of(tables(found)[0])
    assert shown["paper: SD-v2.1-base 512"] == {
        "text": f"31.9 ± {2.65:.1f}",
        "image": f"14.2 ± {1.15:.1f}",
        "group": "10.5 ± 1.1",
    }
    assert shown["paper: OpenAI ViT-L-14 224"]["group"] == "7.8"
    assert len(shown) == 2 + 11
    assert not any(name.startswith("paper") for name in rows_of(tables(found, paper=False)[0]))
    page = to_markdown(found, command="diffenc evaluate winoground")
    assert "Erratum" in page
    assert "3 items where winoground has 400" in page
    assert "| color | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |" in page


def test_patterns_are_in_the_benchmarks_order_and_its_own_direction_has_the_papers_rows(tmp_path):
    found = evaluate(load_mmvp_vlm(mmvp_vlm(tmp_path)), [ColorMatcher("color")], trials=1)
    overall, text, image, group = tables(found)
    assert len(overall.rows) == 2
    assert image.columns == ("model", *PATTERNS, "all")
    assert "the benchmark's own" in image.title
    papers = [[name for name in rows_of(t) if name.startswith("paper")] for t in (text, image)]
    assert (len(papers[0]), len(papers[1])) == (0, 11)
    assert rows_of(image)["paper: SD-v2.1-base 512"]["State"] == f"35.6 ± {19.25:.1f}"
    assert rows_of(group)["color"]["Text"] == "100.0"


def test_everything_is_in_the_json():
    found = evaluate(
        shapes_benchmark("mmvp-vlm", per_label=2),
        [RandomMatcher(), RandomMatcher("once", deterministic=True)],
    )
    content = json.loads(json.dumps(to_dict(found)))
    assert content["models"]["random"]["seeds"] == [0, 1, 2]
    assert content["models"]["once"]["overall"]["text"]["std"] is None
    numbers = content["models"]["random"]["labels"]["pattern"]["count"]["group"]
    assert numbers["items"] == 2
    assert len(numbers["trials"]) == 3
    assert content["models"]["random"]["description"] == {"kind": "random"}
    assert content["items"] == 12


def test_bars_in_names_do_not_break_markdown():
    found = evaluate(shapes_benchmark("winoground", per_label=1), [RandomMatcher("a|b")])
    assert "| a\\|b |" in to_markdown(found)


@pytest.mark.parametrize("name", ["mmvp-vlm", "timesteps"])
def test_the_papers_averages_are_those_of_its_cells(name):
    table = published_table(name)
    assert [table.columns[:-1]] == [tuple(PATTERNS)]
    for row in table.rows:
        assert len(row.values) == 10
        cells, average = row.values[:-1], row.values[-1]
        assert statistics.mean(cells) == pytest.approx(average, abs=0.06)
        if row.deviations is None:  # one trial: whole pairs of 15
            for cell in cells:
                assert cell * 15 / 100 == pytest.approx(round(cell * 15 / 100), abs=0.01)


def test_the_papers_deviations_are_those_of_three_trials_of_fifteen_pairs():
    row = published_table("timesteps").rows[-1]
    assert row.label == "ensemble"
    possible = {
        (round(statistics.mean(k) / 0.15, 1), round(statistics.stdev(k) / 0.15, 2))
        for k in ((a, b, c) for a in range(16) for b in range(16) for c in range(16))
    }
    for mean, deviation in zip(row.values[:-1], row.deviations[:-1], strict=True):
        assert (mean, deviation) in possible
    first = published_table("mmvp-vlm").rows[-1]
    assert (first.values, first.deviations) == (row.values, row.deviations)


def test_the_papers_winoground_is_possible_after_the_erratum_and_was_not_before():
    rows = published_table("winoground").rows
    assert len(rows) == 11
    for row in rows:
        text, image, group = row.values
        assert group <= min(text, image)
        if row.printed:
            assert row.printed == (text, group, image)
            assert row.printed[2] > row.printed[1]
            assert all((4 * value).is_integer() for value in row.values)  # of 400 items
    assert [row.label for row in rows if row.printed is None] == ["SD-v2.1-base 512"]
    assert "draft" in published_source()


def test_an_unknown_table_is_refused():
    with pytest.raises(ConfigError, match=r"known are .*'mmvp-vlm', .*'winoground'"):
        published_table("table 9")


def test_the_page_of_the_papers_tables_is_the_data():
    page = Path(__file__).parents[2] / "docs/results/paper-tables.md"
    assert page.read_text(encoding="utf-8") == paper_page()


def test_further_tags_have_tables_of_their_own(tmp_path):
    found = evaluate(load_winoground(winoground_jsonl(tmp_path)), [ColorMatcher("color")])
    page = to_markdown(found)
    assert "**text / image / group score by num_main_preds, percent**" in page
    assert "| 1 | 2 | 100.0 / 100.0 / 100.0 |" in page


def test_equal_scores_are_told():
    class Coarse(RandomMatcher):
        def __call__(self, images, texts, *, seed):
            return super().__call__(images, texts, seed=seed).round()

    found = evaluate(shapes_benchmark("winoground", per_label=4), [Coarse(), RandomMatcher("fine")])
    notes = [note for note in remarks(found) if "equal scores" in note]
    assert len(notes) == 1
    assert notes[0].startswith("random: ")
    assert notes[0].endswith(" of 20 items have equal scores, which count as wrong")
