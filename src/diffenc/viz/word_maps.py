"""The maps of a text's words: by word, by place, and all in one picture."""

from typing import overload

from PIL import Image

from diffenc.checks.arguments import shown, whole
from diffenc.errors import ConfigError, PromptError, near_matches
from diffenc.viz.figure import Panel, figure, fitted
from diffenc.viz.heatmap import HeatMap


class WordMaps(dict[str, HeatMap]):
    """A map per word, in the order of the words; `maps[0]` is the first, `maps[:2]` a list of two.

    Raises:
        PromptError: On reading a word that has no map, with those that have one.
        ConfigError: On reading a place beyond the last.
    """

    @overload
    def __getitem__(self, word: str | int) -> HeatMap: ...

    @overload
    def __getitem__(self, word: slice) -> list[HeatMap]: ...

    def __getitem__(self, word: str | int | slice) -> HeatMap | list[HeatMap]:
        maps = list(self.values())
        if isinstance(word, slice):
            return maps[word]
        if isinstance(word, int):
            if not -len(maps) <= word < len(maps):
                raise ConfigError(
                    f"no map {word}: there are {len(maps)}, of the words {list(self)}"
                )
            return maps[word]
        if not isinstance(word, str) or word not in self:
            raise PromptError(
                f"no map of {shown(word)} was made.{near_matches(word, self)} The words with a map "
                f"are {list(self)}; pass words=[{shown(word)}] for another one of the text"
            )
        return super().__getitem__(word)

    def to_pil(
        self, *, title: str = "", note: str = "", side: int = 256, columns: int = 4
    ) -> Image.Image:
        """Draw the picture and the map of each word over it, in rows.

        Args:
            title: Text over all maps; "" leaves it out.
            note: Text under all maps, in small letters; "" leaves it out.
            side: Side of a map in pixels, 64 or more.
            columns: Number of panels in a row.

        Raises:
            ConfigError: No map, a side below 64, or no column.
        """
        columns = whole("columns", columns, least=1)
        pictures = [heat.picture for heat in self.values() if heat.picture is not None]
        panels: list[Panel | None] = [Panel(pictures[0], "picture")] if pictures else []
        for word, heat in self.items():
            size = side if heat.picture is None else fitted(heat.picture, side)
            over = heat.to_pil(size, overlay=heat.picture)
            panels.append(Panel(over, word, legend=heat))
        rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
        return figure(rows, title=title, note=note, side=side)

    def __repr__(self) -> str:
        lines = [f"  {heat!r}," for heat in self.values()]
        return "\n".join(["WordMaps(", *lines, ")"])
