"""Tasks of lmms-eval on the miniature twins, with their data in local files."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import lmms_eval

from diffenc.evals.choices import shapes_blink, shapes_mmvp, shapes_naturalbench
from diffenc.evals.llava_bench import shapes_llava_bench

TASK = """\
task: twin_{name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function twins.pictures
doc_to_text: !function twins.text
doc_to_target: answer
process_results: !function twins.{function}
metric_list:
{metrics}
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
"""
METRICS = {
    "mmvp": {
        "mmvp_accuracy": "twins.mmvp_aggregate_results",
        "mmvp_pair_accuracy": "twins.mmvp_aggregate_pair_results",
    },
    "blink": {"blink_acc": "twins.blink_mean_of_tasks"},
    "naturalbench": {
        "naturalbench_Acc": "twins.naturalbench_acc",
        "naturalbench_Q_Acc": "twins.naturalbench_q",
        "naturalbench_I_Acc": "twins.naturalbench_i",
        "naturalbench_G_Acc": "twins.naturalbench_g",
    },
    "bench": {"llava_bench_all": "twins.bench_all"},
}


RELEASED = """\
include: {source}
task: local_{name}
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
process_docs: null
"""
SOURCES = {
    "gqa": "gqa/gqa.yaml",
    "pope": "pope/pope.yaml",
    "mmvp": "mmvp/mmvp.yaml",
    "blink": "blink/blink_counting.yaml",
    "cv_bench": "cv_bench/cv_bench_2d.yaml",
}
"""Tasks that lmms-eval brings, by the name of their copy on local data."""


def benchmarks(size: int) -> dict[str, Any]:
    """The twins, with so many pairs, questions per task, groups and pictures."""
    return {
        "mmvp": shapes_mmvp(size),
        "blink": shapes_blink(size),
        "naturalbench": shapes_naturalbench(size),
        "bench": shapes_llava_bench(size),
    }


def row_of(item: Any) -> dict[str, Any]:
    """An item as a row of a dataset."""
    return {
        "id": item.id,
        "question": item.question,
        "text": getattr(item, "text", item.question),
        "answer": getattr(item, "answer", 0),
        "group": getattr(item, "group", ""),
        "labels": json.dumps(dict(getattr(item, "labels", {}))),
        "context": getattr(item, "context", ""),
        "reference": getattr(item, "reference", ""),
        "pictures": [picture.open() for picture in item.pictures],
    }


def write_tasks(folder: Path, twins: dict[str, Any], *, tokens: int = 16) -> None:
    """Write the YAML file and the parquet file of each twin."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("twins.py"), folder)
    for name, benchmark in twins.items():
        rows = datasets.Dataset.from_list([row_of(item) for item in benchmark.items])
        pictures = datasets.List(datasets.Image())
        rows = rows.cast_column("pictures", pictures)
        rows.to_parquet(folder / f"{name}.parquet")
        metrics = "\n".join(
            f"  - metric: {metric}\n    aggregation: !function {place}\n    higher_is_better: true"
            for metric, place in METRICS[name].items()
        )
        text = TASK.format(
            name=name,
            file=folder / f"{name}.parquet",
            function=name,
            metrics=metrics,
            tokens=tokens,
        )
        (folder / f"{name}.yaml").write_text(text)


def released_rows(twins: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Items of the miniature with the columns of the released data sets."""
    groups, pairs = twins["naturalbench"].items, twins["mmvp"].items
    counts = [item for item in twins["blink"].items if item.group == "Counting"]
    lettered = [
        {
            "idx": item.id,
            "question": item.question,
            "prompt": item.text,
            "choices": list(item.options),
            "answer": f"({'ABCD'[item.answer]})",
            "type": "Count",
            "task": "Count",
            "source": "shapes",
            "sub_task": item.group,
        }
        for item in counts
    ]
    shown = [item.pictures[0].open() for item in counts]
    return {
        "gqa": [
            {"id": item.id, "question": item.question, "answer": item.reference}
            | {"image": item.pictures[0].open()}
            for item in twins["bench"].items
        ],
        "pope": [
            {"question_id": item.id, "question": item.question}
            | {"answer": item.options[item.answer], "image": item.pictures[0].open()}
            for item in groups
        ],
        "mmvp": [
            {
                "Index": int(item.id),
                "Question": item.question,
                "Options": " ".join(
                    f"({letter}) {option}"
                    for letter, option in zip("ab", item.options, strict=False)
                ),
                "Correct Answer": f"({'ab'[item.answer]})",
                "image": item.pictures[0].open(),
            }
            for item in pairs
        ],
        "blink": [
            {**row, "image_1": picture, "image_2": picture}
            for row, picture in zip(lettered, shown, strict=True)
        ],
        "cv_bench": [
            {**row, "image": picture} for row, picture in zip(lettered, shown, strict=True)
        ],
    }


def write_released_tasks(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write tasks that include lmms-eval's own, with data of the miniature in local files."""
    home = Path(lmms_eval.__file__).parent / "tasks"
    for name, table in rows.items():
        file = folder / f"local_{name}.parquet"
        made = datasets.Dataset.from_list(table)
        for column in ("image", "image_1", "image_2"):
            if column in made.column_names:
                made = made.cast_column(column, datasets.Image())
        made.to_parquet(file)
        text = RELEASED.format(source=home / SOURCES[name], name=name, file=file)
        (folder / f"local_{name}.yaml").write_text(text)
