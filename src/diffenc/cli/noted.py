"""The command that runs: its name, and how to ask for it again."""

import shlex
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand

_CONTEXT: ContextVar[Any] = ContextVar("the command that runs")


class NotedCommand(TyperCommand):
    """A command whose context can be asked for while it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Run, with the context noted."""
        token = _CONTEXT.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _CONTEXT.reset(token)


def command_name() -> str:
    """Name of the command that runs."""
    return str(_CONTEXT.get().info_name)


def command_line() -> str:
    """The command line that runs the present command again."""
    context = _CONTEXT.get()
    path = context.command_path.split()
    words = ["diffenc", *path[1:]]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in ("force", "_debug", "as_json"):
            continue
        value, flag = context.params[name], parameter.opts[0]
        if parameter.param_type_name == "argument":
            words.append(shlex.quote(str(value)))
        elif isinstance(value, bool):
            words.append(flag if value else parameter.secondary_opts[0])
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [flag, shlex.quote(str(each))]
    return " ".join(words)
