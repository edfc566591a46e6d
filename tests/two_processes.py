"""Trainings that two processes share, several in one start of both: starting takes seconds."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffenc.mllm.training import TrainConfig, train


@dataclass(frozen=True)
class Job:
    """One call of `train`: the file of its config, and how it is called."""

    config: str
    resume: bool = False
    stop_after: int | None = None


def train_on_two(jobs: list[Job], folder: Path) -> list[list[dict[str, Any]]]:
    """Run trainings one after the other on two processes; their outcomes, by process."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    launch("two_processes", str(folder))
    return [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in range(2)]


def launch(module: str, *arguments: str) -> str:
    """What a module prints that two processes run; it must succeed."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path.cwd(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def main(folder: Path) -> None:
    """What each process does."""
    outcomes = []
    for entry in json.loads((folder / "jobs.json").read_text()):
        job = Job(**entry)
        result = train(
            TrainConfig.read(job.config),
            resume=job.resume,
            stop_after=job.stop_after,
            device="cpu",
        )
        outcome = {"steps": result.steps, "resumed_at": result.resumed_at, "loss": result.loss}
        outcomes.append({**outcome, "held": dict(result.held)})
    path = folder / f"outcome_{os.environ['RANK']}.json"
    path.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
