"""Objects watched for change: what they are, hold and refer to, down to the storage of tensors.

A tree of objects is walked once, slowly, and what was found is compared with what is there at each
later look, fast. Each state gets a number that is never given again. Nothing here keeps a model
alive: objects are watched through weak references, whose death says that an identity may come back
as that of something else.
"""

import logging
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from itertools import count
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_numbers = count(1)

_BARE = frozenset(vars(nn.Module()))
"""Attributes that every module has; those that affect results are read by name."""

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    np.generic,
    Enum,
    types.ModuleType,
)
_PLAIN = frozenset({bool, int, float, str, type(None)})  # the most of them, told apart faster
_FUNCTIONS = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    partial,
)
_CALM = (  # compute the same in training mode
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Identity,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
)
_LOCK = threading.RLock()
_WATCHES: dict[int, tuple[weakref.ref[Any], "Watch"]] = {}
_NUMBERED: dict[int, tuple[weakref.ref[Any], int]] = {}
_OBJECT = object()
_CORE = itemgetter("_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_SMALL = 2**20
_NOTES = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
    }
)
"""Entries that libraries write into a model's config when they save it, and never read later."""

_INSTALLED = frozenset({"_output_capturing_hooks_installed"})
"""What transformers notes in a model at its first call, when it puts hooks in that only read."""

_MOST = 100_000
"""Largest number of watched objects; results of a root that leads to more are not cached."""


class _Node:
    """One object: its class, plain settings, and the identities of what else it refers to.

    Attributes:
        reference: Function, such as a weak reference, that returns the object, or None once it is
            gone.
        is_restless: Whether it is a module that may give other results each time while it trains.
    """

    __slots__ = (
        "_containers",
        "_count",
        "_hooks",
        "_identities",
        "_kind",
        "_leaves",
        "_leaves_of",
        "_noted",
        "_parts",
        "_parts_of",
        "is_restless",
        "reference",
    )

    def __init__(self, reference: Callable[[], Any]) -> None:
        self.reference = reference
        self.is_restless = False
        self._kind: type | None = None
        self._identities: tuple[int, ...] | None = None
        self._parts: tuple[int, ...] | None = None

    def holds(self, owner: Any) -> bool:
        """Whether the object is what it was when it was read: a few microseconds each."""
        attributes = owner.__dict__
        if type(owner) is not self._kind:
            return False
        notes = len(self._noted.intersection(attributes)) if self._noted else 0
        if len(attributes) - notes != self._count:
            return False
        try:
            if self._leaves_of is not None and self._leaves_of(attributes) != self._leaves:
                return False
            if self._parts_of is not None and _ids(self._parts_of(attributes)) != self._parts:
                return False
            for name, content in self._containers:
                if _frozen(attributes[name]) != content:
                    return False
        except KeyError:
            return False
        if self._identities is None:
            return True
        modules, parameters, buffers, before, after = _CORE(attributes)
        if (before or after or self._hooks) and _hooks(attributes) != self._hooks:
            return False
        if buffers or (modules and parameters):
            return self._identities == _core_ids(attributes)
        return self._identities == tuple(map(id, (modules or parameters).values()))

    def read(self, owner: Any, visit: Callable[[object], None]) -> None:
        """Note what the object is now, and hand on what it refers to."""
        attributes = dict(owner.__dict__)
        is_module = isinstance(owner, nn.Module)
        self._kind, self._noted = type(owner), _notes_of(attributes, is_module)
        if self._noted:
            attributes = {k: v for k, v in attributes.items() if k not in self._noted}
        self._count = len(attributes)
        self.is_restless = is_module and not _is_calm(owner)
        self._identities = _core_ids(attributes) if is_module else None
        self._hooks = _hooks(attributes) if is_module else ()
        if is_module:
            for tree in ("_modules", "_parameters", "_buffers"):
                for value in attributes[tree].values():
                    if value is not None:
                        visit(value)
            attributes = {k: v for k, v in attributes.items() if k not in _BARE}
        leaves = [name for name, value in attributes.items() if _is_leaf(value)]
        held = [n for n, value in attributes.items() if isinstance(value, _CONTAINERS)]
        held = [name for name in held if name not in leaves]
        parts = [name for name in attributes if name not in leaves and name not in held]
        self._leaves_of = itemgetter(*leaves) if leaves else None
        self._leaves = self._leaves_of(attributes) if self._leaves_of else None
        self._parts_of = itemgetter(*parts, *parts[:1]) if parts else None  # a tuple in any case
        self._parts = _ids(self._parts_of(attributes)) if self._parts_of else None
        for name in parts:
            visit(attributes[name])
        self._containers = [(name, _frozen(attributes[name], visit)) for name in held]

    @property
    def links(self) -> tuple[object, ...]:
        """Identities of what the object refers to."""
        return self._identities, self._parts


class Watch:
    """Record of a root and everything below it, as they were at the last look.

    Args:
        root: Module, or another object, that is watched together with everything it refers to.
    """

    def __init__(self, root: object) -> None:
        self._root = weakref.ref(root)
        self._guard = threading.Lock()
        self._start()

    def look(self) -> tuple[int, int | None]:
        """Numbers of the present structure and state; None where nothing may be cached."""
        with self._guard:
            self._look()
            known = not self._opaque and self._compare_tensors()
            return self._structure, self._state if known else None

    def state(self) -> int | None:
        """Number of the present state, or None where nothing may be cached."""
        return self.look()[1]

    def structure(self) -> int:
        """Number of the present structure."""
        with self._guard:
            self._look()
            return self._structure

    def begin_anew(self) -> None:
        """Forget everything and start watching the root anew."""
        with self._guard:
            self._start()

    def _start(self) -> None:
        # A list of its own for each start: late deaths of what is not watched any more say nothing.
        self._dead: list[object] = []
        self._known: set[int] = set()
        self._nodes: list[_Node] = []
        self._kept: list[object] = []
        self._tensors: list[weakref.ref[Tensor]] = []
        self._storages: list[StorageWeakRef | None] = []
        self._values: list[object] = []
        self._classes: dict[type, object] = {}
        self._opaque = False
        self._structure = self._state = next(_numbers)
        self._visit(self._root())

    def _look(self) -> None:
        """Compare every object with what it was, and take in what changed."""
        changed = False
        for _ in range(3):  # objects may die meanwhile, where another thread exchanges some
            if self._dead:
                self._start()
            changed = self._compare_nodes()
            if not self._dead:
                break
        if changed:
            self._structure = self._state = next(_numbers)

    def _compare_nodes(self) -> bool:
        changed = self._compare_classes()
        root = self._root()
        opaque = isinstance(root, nn.Module) and root.training
        for node in self._nodes:  # which grow while objects are found
            owner = node.reference()
            if owner is None:
                return True
            if not node.holds(owner):
                self._read(node, owner)
                changed = True
            if node.is_restless and owner.__dict__["training"]:
                opaque = True
        self._opaque = opaque or len(self._nodes) > _MOST
        return changed

    def _read(self, node: _Node, owner: object) -> None:
        links = node.links
        node.read(owner, self._visit)
        self._classes.setdefault(type(owner), _code(type(owner)))
        if links not in ((None, None), node.links):
            self._dead.append(node)  # what it referred to before may live on, and counts no more

    def _compare_classes(self) -> bool:
        """Whether the code of a class was exchanged."""
        before, self._classes = self._classes, {kind: _code(kind) for kind in self._classes}
        return before != self._classes

    def _visit(self, value: object) -> None:
        """Watch an object, and later what it leads to."""
        if id(value) in self._known or len(self._nodes) > _MOST:
            return
        self._known.add(id(value))
        try:
            reference = weakref.ref(value, self._dead.append)
        except TypeError:  # kept, so that its identity stays its own
            self._kept.append(value)
            return
        if isinstance(value, Tensor):
            self._tensors.append(reference)  # type: ignore[arg-type]
            self._storages.append(_storage(value))
            self._values.append(None)
            return
        self._kept.append(reference)
        if isinstance(value, types.MethodType):
            self._visit(value.__self__)
        elif isinstance(value, partial):
            _frozen((value.args, value.keywords), self._visit)
            self._visit(value.func)
        elif hasattr(value, "__dict__") and not isinstance(value, (*_FUNCTIONS, logging.Logger)):
            self._nodes.append(_Node(reference))

    def _compare_tensors(self) -> bool:
        """Look for new values; False if changes cannot be seen, or a tensor is trained."""
        expired = torch.UntypedStorage._expired
        values, storages = self._values, self._storages
        for index, reference in enumerate(self._tensors):
            tensor, storage = reference(), storages[index]
            if tensor is None or storage is None or type(tensor) not in _PLAIN_TENSORS:
                return False
            if tensor.requires_grad:
                return False
            try:
                value = tensor._version, tensor.data_ptr(), tensor.stride(), tensor.dtype
            except RuntimeError:  # no strides, no storage, or made in inference mode
                return False
            # A new storage may begin where the old one did.
            if value != values[index] or expired(storage.cdata):
                values[index], storages[index] = value, _storage(tensor)
                self._state = next(_numbers)
        return True


def watch_of(root: object) -> Watch:
    """The watch over an object and what it leads to, the same one for each call."""
    with _LOCK:
        known = _WATCHES.get(id(root))
        if known is not None and known[0]() is root:
            return known[1]
        identity = id(root)
        reference = weakref.ref(root, lambda _: _WATCHES.pop(identity, None))
        watch = Watch(root)
        _WATCHES[identity] = (reference, watch)
        return watch


def free_to_swap(roots: Iterable[object]) -> None:
    """Let torch swap the tensors of modules, which it refuses while anybody watches them.

    It swaps where a program asks for it, for all modules; see `torch.__future__`.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        for root in roots:
            watch_of(root).begin_anew()


def object_key(thing: object) -> int:
    """A number for one object: no other one ever gets it."""
    with _LOCK:
        known = _NUMBERED.get(id(thing))
        if known is not None and known[0]() is thing:
            return known[1]
        identity = id(thing)
        number = next(_numbers)
        # The entry goes with the object, before another one can have its identity.
        reference = weakref.ref(thing, lambda _: _NUMBERED.pop(identity, None))
        _NUMBERED[identity] = (reference, number)
        return number


def _count_writes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let autograd count what an optimizer wrote: fused kernels write without being counted."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_writes)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


def _ids(values: Iterable[object]) -> tuple[int, ...]:
    return tuple(map(id, values))


def _core_ids(attributes: dict[str, Any]) -> tuple[int, ...]:
    """Identities of submodules, parameters and buffers."""
    modules, parameters, buffers, _, _ = _CORE(attributes)
    return tuple(map(id, (*modules.values(), *parameters.values(), *buffers.values())))


def _hooks(attributes: dict[str, Any]) -> tuple[int, ...]:
    """Hooks of a module but for those that only read; torch never counts two by one number."""
    *_, before, after = _CORE(attributes)
    every = (*tuple(before.items()), *tuple(after.items()))
    return tuple(number for number, hook in every if not _only_reads(hook))


def _is_leaf(value: Any) -> bool:
    """Whether a value says all about itself, and cannot change."""
    if type(value) in (tuple, torch.Size, frozenset):
        return all(map(_is_leaf, value))
    return isinstance(value, _LEAVES)


def _frozen(value: Any, visit: Callable[[object], None] | None = None) -> object:
    """An unchanging form of a value: the content of containers, the identity of objects.

    Args:
        value: Value of any type.
        visit: Function that is called with every object whose identity counts.
    """
    if type(value) in _PLAIN or isinstance(value, _LEAVES):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= _SMALL:
        return value.shape, value.dtype.str, value.tobytes()
    if not isinstance(value, _CONTAINERS):
        if visit is not None:
            visit(value)
        return _OBJECT, id(value)
    if visit is not None and getattr(value, "__dict__", None):
        visit(value)  # configs of diffusers hold each setting twice, as an entry and an attribute
    entries = tuple(value.items()) if isinstance(value, dict) else tuple(value)
    if isinstance(value, dict) and "_class_name" in value:
        entries = tuple(entry for entry in entries if entry[0] not in _NOTES)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_frozen(entry, visit) for entry in entries)
    if isinstance(value, dict):
        names = tuple(name for name, _ in entries)
        return type(value), names, tuple(_frozen(entry, visit) for _, entry in entries)
    return type(value), tuple(_frozen(entry, visit) for entry in entries)


def _notes_of(attributes: dict[str, Any], is_module: bool) -> frozenset[str]:
    """Names of attributes that come and go and change no result."""
    if is_module:
        return _INSTALLED if "config" in attributes else frozenset()
    is_config = "_class_name" in attributes or "transformers_version" in attributes
    return _NOTES if is_config else frozenset()


def _only_reads(hook: Any) -> bool:
    """Whether a hook is one that reads, and changes nothing: this library's, or transformers'."""
    hook = hook.__func__ if isinstance(hook, types.MethodType) else hook
    home = str(getattr(hook, "__globals__", {}).get("__name__"))
    return home.partition(".")[0] == "diffenc" or home == "transformers.utils.output_capturing"


def _code(kind: type) -> object:
    return getattr(kind, "forward", None), getattr(kind, "__call__", None)  # noqa: B004


def _is_calm(module: nn.Module) -> bool:
    """Whether a module computes the same in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0
    return type(module) in _CALM
