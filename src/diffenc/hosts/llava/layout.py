"""Where a fork of LLaVA keeps what is hooked: found by what classes and functions have and call.

Forks rename modules, leave old ones behind and build towers in their own ways. So nothing is taken
by the name of a file alone: a builder counts if the fork calls it, a model if it splices images
into text, a trainer if the training script makes one.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from diffenc.errors import ConfigError

SPLICE = "prepare_inputs_labels_for_multimodal"


def import_part(package: str, part: str) -> ModuleType:
    """A module of a fork's package.

    Raises:
        ConfigError: It cannot be imported.
    """
    try:
        return importlib.import_module(f"{package}.{part}")
    except Exception as error:  # a fork's own code runs here, and what an earlier failure left
        cause = _hidden_cause(package, error)
        taken = "already used by a Transformers" in str(cause)
        advice = _advice(package, "transformers" if taken else getattr(cause, "name", None) or "")
        fault = cause if isinstance(cause, ImportError) else f"{type(cause).__name__}: {cause}"
        raise ConfigError(f"cannot import {package}.{part}: {fault}. {advice}.") from error


def _hidden_cause(package: str, error: Exception) -> Exception:
    """What made a fork's models fail to import, where its `except: pass` hides that.

    LLaVA's `model/__init__.py` goes on without the models that fail, and what fails in the end is a
    module that needs one of them.
    """
    name = getattr(error, "name", None) or ""
    models = sys.modules.get(f"{package}.model")
    if models is None or type(error) is not ImportError or not name.startswith(package):
        return error
    for place in getattr(models, "__path__", []):
        for info in pkgutil.iter_modules([f"{place}/language_model"]):
            try:
                importlib.import_module(f"{package}.model.language_model.{info.name}")
            except Exception as cause:  # the fork's own code
                return cause
    return error


def _advice(package: str, missing: str) -> str:
    """What to do when a module of a fork cannot be imported for want of another module."""
    top = package.partition(".")[0]
    if missing == top:
        return (
            "Put the fork's folder on the path (pip install -e . in it) and pass the name of its "
            "top-level module"
        )
    if missing.partition(".")[0] == "transformers":
        import transformers

        return (
            f"The fork was written for another transformers than {transformers.__version__}. "
            "diffenc.hosts.llava.modernize() supplies what LLaVA itself lacks; what is missing "
            "after it needs the version that the fork names"
        )
    if missing.startswith(f"{top}."):
        return (
            "The fork has no such part: name the one that it has (script=, builder=, loader=). "
            "TinyLLaVA and prismatic have hooks of their own: diffenc.hosts.tinyllava and "
            "diffenc.hosts.prismatic"
        )
    if missing:
        return "The fork itself needs that: install what its own guide names"
    return (
        "The fork's own code fails: see the error above it, and install the versions that its own "
        "guide names"
    )


def function_at(package: str, place: str) -> tuple[ModuleType, str]:
    """Module and name of a function that stands at "model.builder:load_pretrained_model".

    Raises:
        ConfigError: The place does not parse, or has no such function.
    """
    part, colon, name = place.partition(":")
    if not (part and colon and name.isidentifier()):
        raise ConfigError(
            f"a place is 'module:function', such as 'model.builder:load', got {place!r}"
        )
    module = import_part(package, part)
    if not callable(getattr(module, name, None)):
        similar = [each for each in vars(module) if each.startswith(name.split("_")[0])]
        raise ConfigError(
            f"{module.__name__} has no {name}; "
            + (f"it has {', '.join(sorted(similar))}. " if similar else "")
            + f"{package!r} is laid out in another way than LLaVA: say where its functions are "
            "(register's builder= and loader=), or build DiffusionVisionTower in its builder by "
            "hand"
        )
    return module, name


def loaded_modules(package: str) -> Iterator[ModuleType]:
    """Modules of a package that were imported so far."""
    for path, module in list(sys.modules.items()):
        if (path == package or path.startswith(f"{package}.")) and isinstance(module, ModuleType):
            yield module


def import_architectures(package: str) -> None:
    """Import the modules `model.*_arch`, which some packages leave to their scripts."""
    model = sys.modules.get(f"{package}.model")
    for info in pkgutil.iter_modules(getattr(model, "__path__", [])):
        if info.name.endswith("_arch"):
            import_part(package, f"model.{info.name}")


def names_used(function: Callable[..., Any]) -> set[str]:
    """Names that a function looks up, those in its comprehensions and inner functions too."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else _names_in(code)


def _names_in(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def callers(package: str, name: str, function: Any) -> list[str]:
    """Functions and methods of a package that call a function by its name.

    Args:
        package: Name of the package.
        name: Name that the function has in its own module.
        function: The function; who calls another one by the same name does not count.
    """
    return [
        f"{module.__name__}.{each.__qualname__}"
        for module in loaded_modules(package)
        for each in _functions(module)
        if each is not function
        and name in names_used(each)
        and each.__globals__.get(name, function) is function
    ]


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Functions and methods of a module, as they were written."""
    for value in list(vars(module).values()):
        for part in vars(value).values() if isinstance(value, type) else (value,):
            bare = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
            if isinstance(bare, FunctionType):
                written = inspect.unwrap(bare)
                yield written if isinstance(written, FunctionType) else bare


def require_caller(package: str, module: ModuleType, name: str) -> None:
    """Refuse a builder that the fork never calls, so that replacing it would change nothing.

    Raises:
        ConfigError: Nothing calls it.
    """
    function = getattr(module, name)
    if callers(package, name, function):
        return
    import_architectures(package)
    if callers(package, name, function):
        return
    tables = [
        f"{each.__name__}.{key}"
        for each in loaded_modules(package)
        for key, value in vars(each).items()
        if isinstance(value, dict) and any(entry is function for entry in value.values())
    ]
    others = [
        each
        for each, value in vars(module).items()
        if each.startswith("build") and callable(value) and callers(package, each, value)
    ]
    hints = [
        f"It stands in the table {table}: put your tower's name there, with DiffusionVisionTower "
        "as its value."
        for table in tables
    ]
    if others:
        hints.append(
            f"It calls {', '.join(sorted(others))}: if that builds a tower of a config, or a list "
            f"of towers, pass builder='{module.__name__.removeprefix(package + '.')}:{others[0]}'."
        )
    if not hints:
        hints = ["If a module does that is not imported yet, import it first."]
    raise ConfigError(
        f"nothing in {package!r} calls {module.__name__}.{name}, so replacing it would change "
        f"nothing. {' '.join(hints)}"
    )


def require_one_value(package: str) -> None:
    """Refuse a fork that takes several values from its tower's call.

    A tensor of as many pictures would be taken apart without an error.

    Raises:
        ConfigError: A function of the fork takes apart what its tower returns.
    """
    for module in loaded_modules(package):
        for function in _functions(module):
            if "get_vision_tower" in names_used(function) and (line := _taken_apart(function)):
                raise ConfigError(
                    f"{module.__name__}.{function.__qualname__} takes several values from its "
                    f"tower ({line}), and a tower of diffenc returns one tensor of tokens. Build "
                    "a module around DiffusionVisionTower that returns what the fork expects, and "
                    "let its builder make that"
                )


def _taken_apart(function: FunctionType) -> str:
    """The statement of a function that takes a tower's result apart, or ""."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source at hand
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            called = node.value.func if isinstance(node.value, ast.Call) else None
            inner = called.func if isinstance(called, ast.Call) else None
            if isinstance(inner, ast.Attribute) and inner.attr == "get_vision_tower":
                return ast.unparse(node)
    return ""


def splicing_models(package: str) -> list[type[nn.Module]]:
    """Models of a package that splice images into text, the classes that generate.

    Raises:
        ConfigError: There is none among the modules that are imported.
    """
    models = {
        value: None
        for module in loaded_modules(package)
        for value in list(vars(module).values())
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and hasattr(value, SPLICE)
        and hasattr(value, "generate")
    }
    if not models:
        raise ConfigError(
            f"no class of {package!r} that is an nn.Module has {SPLICE} and generate, so there is "
            "no model to hand prompts to. Import the module of your model first, or pass its class "
            "(models=)"
        )
    return list(models)


def trainer_of(script: ModuleType, function: FunctionType) -> str:
    """Name, in a training script, of the trainer that its function makes.

    Raises:
        ConfigError: It makes none that takes callbacks, or several.
    """
    names = [
        name
        for name in sorted(names_used(function))
        if isinstance(getattr(script, name, None), type)
        and hasattr(getattr(script, name), "add_callback")
    ]
    if len(names) != 1:
        raise ConfigError(
            f"{script.__name__}.{function.__name__} makes "
            + (f"several trainers, {', '.join(names)}" if names else "no trainer of its module")
            + "; name it (trainer=), or hand prompts over by hand: take_prompts(model), "
            "prompted_data(data_module, tower), trainer.add_callback(AdapterCallback())"
        )
    return names[0]
