"""What trains, and the language model, split over the processes of a run by torch's `fully_shard`.

Each process holds one part of every such weight, of its gradient and of AdamW's moments. A layer of
the language model is put together for the moment in which it computes; what else is split, at the
beginning of a step. The rest of the encoder is frozen, and stays whole in every process.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffenc.errors import BackboneError, ConfigError
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.training.config import OptimConfig

_LEAST_TORCH = (2, 7)
"""Since this version `fully_shard` leaves out parameters that it is told to."""
_LAUNCHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launch(optim: OptimConfig, processes: int) -> None:
    """Raise unless the processes were started in a way in which a run can be split.

    Args:
        optim: Options of the optimization.
        processes: Number of processes that share the run.

    Raises:
        ConfigError: A launcher is to split the model itself, or torch is too old.
    """
    for variable, name in _LAUNCHERS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"accelerate was told to use {name}, which would split the model a second time and "
                "unlike its checkpoints; start with torchrun, or accelerate without it, and set "
                'optim.shard = "zero3" or "zero2" in the TOML file'
            )
    number = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
    if optim.shard != "none" and processes > 1 and number < _LEAST_TORCH:
        raise ConfigError(
            f"optim.shard needs torch {'.'.join(map(str, _LEAST_TORCH))} or newer, and this is "
            f'{version("torch")}; take optim.shard = "none" and adapt.language_model = "lora"'
        )


def shard(vlm: DiffusionVLM, optim: OptimConfig, device: torch.device) -> None:
    """Split a model over the processes of the run, in place; it then runs and trains as before.

    Every process calls this with the same model, on the CPU or on its device, and ends up with its
    parts on its device. The process group must have begun.

    Args:
        vlm: Model in which all that trains requires a gradient.
        optim: Options of the optimization, whose `shard` is not "none".
        device: Device of this process.

    Raises:
        ConfigError: A parameter is a single number without an axis, which cannot be split.

    Source:
        Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, stages 2 and 3; Zhao et al. 2023 (FSDP),
        arXiv:2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    vlm.encoder.to(device)
    frozen = {p for p in vlm.encoder.parameters() if not p.requires_grad}
    for name, parameter in vlm.named_parameters():
        if parameter.ndim == 0 and parameter not in frozen:
            raise ConfigError(
                f"{name} is a single number and cannot be split over processes; take optim.shard = "
                '"none"'
            )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Layers are put together in the precision of the computation; sums stay in float32.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = low if optim.precision == "bf16" else MixedPrecisionPolicy()
    for layer in layers_of(vlm.language_model):
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, reshard_after_forward=optim.shard == "zero3"
        )
    fully_shard(vlm, mesh=mesh, ignored_params=frozen)


def layers_of(language_model: nn.Module) -> list[nn.Module]:
    """The layers of a language model: of its lists of modules the one with most parameters."""
    lists = [module for module in language_model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in each.parameters()) for each in lists]
    return [] if not lists else list(lists[sizes.index(max(sizes))])


def is_sharded(vlm: nn.Module) -> bool:
    """Whether `shard` has split a model."""
    return any(_is_part(parameter) for parameter in vlm.parameters())


def gathered(state: Any, *, keep: bool) -> Any:
    """A nested state with every tensor whole and on the CPU; all processes call it together.

    Args:
        state: Tensors, split or not, in mappings and lists.
        keep: Whether this process wants the result; elsewhere tensors come back empty.
    """
    if isinstance(state, Tensor):
        entire = state.detach()
        if _is_part(entire):
            entire = cast(Any, entire).full_tensor()
        return entire.cpu() if keep else torch.empty(0, dtype=state.dtype, device="cpu")
    if isinstance(state, Mapping):
        return {name: gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value, keep=keep) for value in state)
    return state


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as a parameter is.

    Args:
        value: Whole tensor, in the shape of the parameter.
        parameter: Parameter, split or not.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has the whole tensor and cuts its own part: nothing is sent.
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def set_trained(vlm: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set what trains in a model, split or not, to whole tensors by name."""
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(part_like(state[name], parameter))


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Set an optimizer over split parameters to the state of one over whole ones.

    Args:
        optimizer: Optimizer, with the parameters of the saved one in the same order.
        state: What `state_dict` of an optimizer over whole parameters gives.

    Raises:
        BackboneError: It is the state of another optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = state["state"]
    if any(not 0 <= index < len(parameters) for index in saved):
        raise BackboneError("the optimizer's state is of other parameters")
    split = {
        index: {
            key: part_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in values.items()
        }
        for index, values in saved.items()
    }
    optimizer.load_state_dict({**state, "state": split})


def held_bytes(vlm: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes that this process holds between two steps, by use.

    Args:
        vlm: Model, split or not.
        optimizer: Optimizer of what trains.
    """
    held = {"frozen weights": 0, "trained weights": 0, "AdamW": 0}
    for parameter in vlm.parameters():
        held["trained weights" if parameter.requires_grad else "frozen weights"] += _own(parameter)
    for values in optimizer.state.values():
        moments = (v for v in values.values() if isinstance(v, Tensor) and v.ndim)
        held["AdamW"] += sum(map(_own, moments))
    return held


def _is_part(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _own(tensor: Tensor) -> int:
    local = cast(Any, tensor).to_local() if _is_part(tensor) else tensor
    return int(local.numel() * local.element_size())
