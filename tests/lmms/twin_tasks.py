"""Tasks of lmms-eval on the miniature twins, with their data in local files."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets

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
        rows.cast_column("pictures", pictures).to_parquet(folder / f"{name}.parquet")
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
