"""Picture files on the command line: all looked at before a model is loaded, some left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from diffenc.cli.progress import progress_bar
from diffenc.errors import ImageError

_BAR_FROM = 20


@dataclass
class PictureFiles:
    """The pictures of a command.

    Attributes:
        paths: Paths of all pictures that were named.
        skip_broken: Whether pictures that cannot be read are left out, instead of raising an error.
        broken: Reason why a picture cannot be read, by its index in `paths`.
    """

    paths: Sequence[Path]
    skip_broken: bool = False
    broken: dict[int, str] = field(default_factory=dict)

    @property
    def kept(self) -> list[int]:
        """Places of the pictures that are not known to be broken."""
        return [place for place in range(len(self.paths)) if place not in self.broken]

    @property
    def kept_paths(self) -> list[Path]:
        """The pictures that are not known to be broken."""
        return [self.paths[place] for place in self.kept]

    @property
    def left_out(self) -> list[str]:
        """Names of the others."""
        return [str(self.paths[place]) for place in sorted(self.broken)]

    def check(self) -> bool:
        """Decode every picture that is kept; whether any turned out to be broken.

        Raises:
            ImageError: Some are broken and shall not be skipped, or none is left.
        """
        from diffenc.inputs.images import broken_images

        kept = self.kept
        if not kept:
            return False
        if len(kept) < _BAR_FROM:
            broken = broken_images(self.kept_paths)
        else:
            with progress_bar("looking at pictures", unit="images") as progress:
                broken = broken_images(self.kept_paths, progress=progress)
        for place, fault in broken.items():
            self.broken[kept[place]] = fault
        self.require_some()
        return bool(broken)

    def skip(self, place: int, error: ImageError) -> None:
        """Leave out a picture that broke after it was checked.

        Raises:
            ImageError: `error`, unless broken pictures shall be skipped.
        """
        if not self.skip_broken:
            raise error
        self.broken[place] = str(error)

    def require_some(self) -> None:
        """Refuse to go on where that is not wanted, or with nothing.

        Raises:
            ImageError: Some are broken and shall not be skipped, or none is left.
        """
        from diffenc.inputs.images import describe_broken

        if not self.broken or (self.skip_broken and self.kept):
            return
        summary = describe_broken(self._faults(), len(self.paths))
        hint = "; --skip-broken goes on without them" if self.kept else ""
        raise ImageError(summary + hint)

    def report(self) -> None:
        """Say on standard error what was left out."""
        from diffenc.inputs.images import describe_broken

        if self.broken:
            summary = describe_broken(self._faults(), len(self.paths))
            typer.echo(f"warning: {summary}; left out", err=True)

    def _faults(self) -> list[str]:
        return [self.broken[place] for place in sorted(self.broken)]
