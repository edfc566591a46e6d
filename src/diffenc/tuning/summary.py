"""What an encoder is made of, as a table: how many parameters, how many of them train, dtypes."""

from collections.abc import Mapping, Sequence

from torch import nn


def parameter_table(parts: Mapping[str, Sequence[nn.Parameter]]) -> str:
    """A line for each part: its name, parameters, how many of them train, and their dtypes."""
    lines = [f"{'part':28}{'parameters':>14}{'trained':>14}  dtype"]
    return "\n".join([*lines, *(_row(name, parameters) for name, parameters in parts.items())])


def _row(name: str, parameters: Sequence[nn.Parameter]) -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:28}{count:>14,}{trained:>14,}  {', '.join(dtypes)}"
