"""Common parts of the commands that ask a model questions: model, prompts, file, report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffenc.cli.evaluate_run import print_tables
from diffenc.cli.files import check_output
from diffenc.cli.options import quiet_libraries, to_device, to_dtype
from diffenc.cli.progress import progress_bar
from diffenc.errors import ConfigError, OutputError, PromptError
from diffenc.storage.names import exists
from diffenc.storage.writing import locked, reporting

if TYPE_CHECKING:
    from diffenc.evals.inspection import Progress
    from diffenc.evals.saved_vlm import SavedVLM
    from diffenc.evals.tables import Table

_MINIATURE = "The items are coloured shapes of 64 pixels; they say nothing of photographs."
_ANSWER = b'{"type": "answer"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Model and options that every command is given.

    Attributes:
        command: Name of the command.
        model: Folder of the model.
        name: Name of the model in tables and files; None takes the name of the folder.
        prompts: Policy of the encoder's prompts; None is the command's default.
        seed: Seed of everything that is drawn at random.
        max_new_tokens: Largest number of tokens in an answer; None is the command's default.
        batch_size: Largest number of questions in one call of the model.
        skip_broken: Whether broken items are left out, instead of raising an error.
        output: File that keeps the answers; None is named after the command.
        force: Whether an existing file of answers is begun anew.
        as_json: Whether JSON is printed and nothing else.
        paper: Whether the paper's rows are shown; None leaves it to the table.
        device: Name of the device that the model runs on.
        dtype: Name of the floating point type of the frozen parts of the model.
    """

    command: str
    model: Path
    name: str | None
    prompts: str | None = None
    seed: int
    max_new_tokens: int | None
    batch_size: int
    skip_broken: bool
    output: Path | None
    force: bool
    as_json: bool
    paper: bool | None
    device: str
    dtype: str

    @property
    def file(self) -> Path:
        """Path of the file of answers."""
        return self.output or Path(f"{self.command}-results.jsonl")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of every evaluation."""
        return {"batch_size": self.batch_size, "skip_broken": self.skip_broken}

    def open_model(self, max_new_tokens: int, *, prompts: str | None = "model") -> "SavedVLM":
        """The model, checked and not loaded yet.

        Args:
            max_new_tokens: Largest number of tokens in an answer, unless the command line gives
                another one.
            prompts: Policy that is taken unless the command line names one; "model" is the
                model's own without its noise and dropout, None is for protocols that have their
                own prompts.

        Raises:
            DiffencError: No such model, device, dtype or policy, or a file that cannot be written.
        """
        check_output(self.file, suffixes=(".jsonl",), force=True)
        device, dtype = to_device(self.device), to_dtype(self.dtype)
        quiet_libraries()
        from diffenc.evals.saved_vlm import SavedVLM
        from diffenc.inputs.policies import parse_policy

        model = SavedVLM(
            self.model,
            name=self.name,
            max_new_tokens=self.max_new_tokens or max_new_tokens,
            device=device,
            dtype=dtype,
        )
        if prompts is None:
            return model
        own = model.prompt_policy.split("|")[0] if prompts == "model" else prompts
        return model.described(prompts=str(parse_policy(self.prompts or own)))

    def draw_prompts(
        self, model: "SavedVLM", samples: Mapping[str, tuple[str, Sequence[str]]]
    ) -> dict[str, str]:
        """The encoder's prompt of each item.

        Args:
            model: Model that `open_model` returned.
            samples: Question and captions of each item, by id.

        Raises:
            ConfigError: The policy needs what the items do not have.
        """
        from diffenc.inputs.policies import PromptSample, parse_policy

        policy = parse_policy(model.description["prompts"])
        try:
            return {
                name: policy(
                    PromptSample(name, [{"from": "human", "value": question}], captions),
                    seed=self.seed,
                )
                for name, (question, captions) in samples.items()
            }
        except PromptError as error:
            raise ConfigError(f"{error}. The policy is {str(policy)!r}; see --prompts") from error

    @contextmanager
    def answers(self, *parts: str) -> "Iterator[tuple[Path, Progress | None]]":
        """The file of answers, and a bar over the parts of the protocol, one after the other.

        Where nothing was answered the file is as it was before, also with --force.
        """
        file, old = self.file, self.file.with_name(f".{self.file.name}.old")
        alone = partial(locked, file.parent, name=file.name, purpose="writing answers to it")
        if self.force and exists(file):
            with alone(), reporting(file):
                file.replace(old)
        new = not exists(file)
        try:
            with progress_bar(*parts, unit="answers") as progress:
                yield file, progress
        except KeyboardInterrupt:
            again = " without --force" if self.force else ""
            typer.echo(
                f"interrupted; what was answered is in {file}, and the same command{again} goes on",
                err=True,
            )
            raise typer.Abort from None
        finally:
            with suppress(OutputError), alone(), reporting(file):  # else it is another program's
                if new and not _has_answers(file):
                    file.unlink(missing_ok=True)
                    if self.force and exists(old):
                        old.replace(file)
                elif self.force:
                    old.unlink(missing_ok=True)

    def report(
        self,
        content: object,
        tables: "Sequence[Table]",
        notes: Sequence[str],
        *,
        count: int,
        fresh: int,
        miniature: bool,
    ) -> None:
        """Print what was found, and where the answers are."""
        if self.as_json:
            typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
            return
        print_tables(tables, notes)
        if fresh < count:
            typer.echo(f"{count - fresh} of {count} answers were there already")
        if miniature:
            typer.echo(_MINIATURE)
        typer.echo(f"answers are in {self.file}")


def refuse(owner: str, **given: object) -> None:
    """Raise a `ConfigError` if any of these options was given.

    Args:
        owner: Description of what the options belong to, for the message.
        given: Values of the options by name, as the command has them; None and False count as not
            given.
    """
    found = [name for name, value in given.items() if value is not None and value is not False]
    if found:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in found)
        belong = "belong" if len(found) > 1 else "belongs"
        raise ConfigError(f"{options} {belong} to {owner}")


def _has_answers(file: Path) -> bool:
    if not exists(file):
        return False
    with file.open("rb") as lines:
        return any(line.startswith(_ANSWER) for line in lines)
