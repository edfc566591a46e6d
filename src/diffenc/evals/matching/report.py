"""Results as tables: for a terminal, as Markdown, as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from diffenc._version import __version__
from diffenc.evals.inspection import summary
from diffenc.evals.matching.evaluate import Evaluation
from diffenc.evals.matching.metrics import CHANCE, METRICS, Metric, Results, tied
from diffenc.evals.matching.sizes import size_table
from diffenc.evals.paper import PublishedTable, published_table
from diffenc.evals.results import Result, percent
from diffenc.evals.tables import Table

_MEANING: Mapping[Metric, str] = {
    "text": "text score: each picture prefers its own caption",
    "image": "image score: each caption prefers its own picture",
    "group": "group score: both",
}
_OFFICIAL: Mapping[str, Metric | None] = {"mmvp-vlm": "image", "winoground": None}


def tables(evaluation: Evaluation, *, paper: bool | None = None) -> list[Table]:
    """All tables of an evaluation: overall, split by labels (one per score), and sizes of models.

    Args:
        evaluation: Evaluation to report.
        paper: Whether the paper's rows are added; None adds them unless the items are miniatures.
    """
    with_paper = evaluation.benchmark.published if paper is None else paper
    made = [_overall(evaluation, with_paper), *_split(evaluation, with_paper)]
    if evaluation.parameters:
        rows = published_table("mmvp-vlm").rows if with_paper else ()
        sizes = {row.label: row.parameters for row in rows if row.parameters is not None}
        made.append(size_table(evaluation.parameters, sizes))
    return made


def tag_tables(evaluation: Evaluation) -> list[Table]:
    """One table per further kind of label: labels down, text / image / group score per model."""
    made = []
    for kind in evaluation.label_kinds():
        if kind == evaluation.benchmark.label_kind:
            continue
        split = {name: evaluation.by_label(name, kind) for name in evaluation.scores}
        rows = []
        for label, first in next(iter(split.values())).items():
            cells = (
                " / ".join(percent(results[label][metric].mean) for metric in METRICS)
                for results in split.values()
            )
            rows.append((label, str(first["text"].items), *cells))
        title = f"text / image / group score by {kind}, percent"
        made.append(Table(title, (kind, "items", *split), tuple(rows)))
    return made


def to_markdown(evaluation: Evaluation, *, command: str = "", paper: bool | None = None) -> str:
    """A page: what was run, the tables, and how to read them."""
    benchmark = evaluation.benchmark
    lines = [f"# {benchmark.name} on {benchmark.source}\n"]
    if command:
        lines.append(f"```console\n{command}\n```\n")
    lines.append(f"{_reading(evaluation)}\n")
    lines += [table.to_markdown() for table in tables(evaluation, paper=paper)]
    lines += [table.to_markdown() for table in tag_tables(evaluation)]
    if benchmark.published if paper is None else paper:
        lines += [f"{note}\n" for note in published_table(benchmark.name).notes]
    lines += [f"- {note}" for note in remarks(evaluation)]
    lines.append(f"\nMade with diffenc {__version__}.")
    return "\n".join(lines) + "\n"


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Every number, per model, label and trial, as JSON holds it."""
    benchmark = evaluation.benchmark
    published = published_table(benchmark.name)
    return {
        "version": __version__,
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "template": benchmark.template,
        "average": benchmark.average,
        "items": len(evaluation.items),
        "chance": dict(CHANCE),
        "notes": list(evaluation.notes),
        "problems": [asdict(problem) for problem in evaluation.problems],
        "models": {
            name: {
                "description": evaluation.descriptions[name],
                "seeds": list(evaluation.seeds[name]),
                "parameters": dict(evaluation.parameters.get(name, {})),
                "overall": _numbers(evaluation.results(name)),
                "labels": {
                    kind: {
                        label: _numbers(results)
                        for label, results in evaluation.by_label(name, kind).items()
                    }
                    for kind in evaluation.label_kinds()
                },
            }
            for name in evaluation.scores
        },
        "paper": [asdict(row) for row in published.rows],
        "paper_columns": list(published.columns),
        "paper_notes": list(published.notes),
    }


def remarks(evaluation: Evaluation) -> list[str]:
    """Notes on data, texts and ties, and what was left out."""
    left_out = (
        [f"{len(evaluation.problems)} problems, left out: {summary(evaluation.problems)}"]
        if evaluation.problems
        else []
    )
    ties = [
        f"{name}: {count} of {len(evaluation.items)} items have equal scores, which count as wrong"
        for name, scores in evaluation.scores.items()
        if scores.ndim == 4 and (count := int(tied(scores).sum()))
    ]
    return [*left_out, *evaluation.notes, *ties]


def _numbers(results: Results) -> dict[str, Any]:
    return {
        metric: {
            "mean": result.mean,
            "std": result.std,
            "trials": list(result.trials),
            "items": result.items,
            "sampling_error_95": result.sampling_error,
        }
        for metric, result in results.items()
    }


def _reading(evaluation: Evaluation) -> str:
    benchmark, count = evaluation.benchmark, len(evaluation.items)
    several = max(map(len, evaluation.seeds.values()))
    error = Result((50.0,), count).sampling_error
    means = (
        f"Overall numbers are means over {benchmark.label_kind}s. "
        if benchmark.average == "labels"
        else ""
    )
    trials = (
        f"± is the sample standard deviation over {several} trials with other noise; "
        if several > 1
        else ""
    )
    return (
        f"Percent of {count} items; {'; '.join(_MEANING.values())}. {means}{trials}the choice of "
        f"items alone gives up to ± {error:.1f} (95 %)."
    )


def _overall(evaluation: Evaluation, with_paper: bool) -> Table:
    rows = [
        (name, *(evaluation.results(name)[metric].text for metric in METRICS))
        for name in evaluation.scores
    ]
    rows.append(("chance", *(percent(CHANCE[metric]) for metric in METRICS)))
    if with_paper and evaluation.benchmark.name == "winoground":
        rows += [
            (f"paper: {row.label}", *row.percents) for row in published_table("winoground").rows
        ]
    title = f"{evaluation.benchmark.name}, {len(evaluation.items)} items, percent"
    return Table(title, ("model", *METRICS), tuple(rows))


def _split(evaluation: Evaluation, with_paper: bool) -> list[Table]:
    """One table per score: models down, labels across."""
    benchmark = evaluation.benchmark
    by_label = {name: evaluation.by_label(name) for name in evaluation.scores}
    labels = list(next(iter(by_label.values())))
    if not labels:
        return []
    paper = published_table("mmvp-vlm") if benchmark.name == "mmvp-vlm" else None
    order = [label for label in (paper.columns if paper else ()) if label in labels]
    labels = [*order, *(label for label in labels if label not in order)]
    made = []
    for metric in METRICS:
        rows = [
            (
                name,
                *(split[label][metric].text for label in labels),
                evaluation.results(name)[metric].text,
            )
            for name, split in by_label.items()
        ]
        rows.append(("chance", *[percent(CHANCE[metric])] * (len(labels) + 1)))
        official = metric == _OFFICIAL[benchmark.name]
        if with_paper and official and paper and paper.columns[:-1] == tuple(labels):
            rows += _paper_rows(paper)
        title = f"{_MEANING[metric]}, by {benchmark.label_kind}"
        title += " (the benchmark's own)" if official else ""
        made.append(Table(title, ("model", *labels, "all"), tuple(rows)))
    return made


def _paper_rows(table: PublishedTable) -> list[tuple[str, ...]]:
    return [(f"paper: {row.label}", *row.percents) for row in table.rows]
