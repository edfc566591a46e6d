"""What the tests on a GPU share: the device, pictures, and a model with some weight to it."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    return torch.device("cuda")


@pytest.fixture(scope="session")
def narrow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 2.1 with all layers and an eighth of the channels, which fills memory measurably."""
    path = Path(__file__).parents[2] / "benchmarks" / "real_size.py"
    spec = importlib.util.spec_from_file_location("real_size", path)
    assert spec is not None
    assert spec.loader is not None
    real_size = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_size)
    folder = tmp_path_factory.mktemp("narrow") / "sd2.1-base"
    return real_size.build_folder("sd2.1-base", folder, dtype=torch.float16, narrow=True)


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """Three, (3 3 72 88), uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 72, 88), generator=generator, dtype=torch.uint8)
