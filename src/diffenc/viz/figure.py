"""Pictures with titles and captions, in rows, as one picture."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from diffenc.errors import ConfigError
from diffenc.viz.arrays import as_picture
from diffenc.viz.heatmap import HeatMap

_INK, _FAINT, _PAPER = (28, 28, 32), (95, 95, 102), (255, 255, 255)
_LINE, _BEST = (188, 190, 198), (216, 80, 62)
# Pillow's own font has ASCII, quotation marks and little else.
_SPELLINGS = str.maketrans(
    {
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "×": "x",
        "–": "-",
        "\N{MINUS SIGN}": "-",
        "→": ">",
        "≤": "<=",
    }
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One place of a figure.

    Attributes:
        image: Picture whose longer side fills the panel, with its aspect ratio kept; it is kept
            upright, in RGB and over white. None leaves the place to the caption.
        title: Text above the image, in dark letters.
        caption: Text below the image, in grey letters; it is wrapped, never cut.
        legend: Heat map whose colours and range are shown under the image; None shows none.
    """

    image: Image.Image | None = None
    title: str = ""
    caption: str = ""
    legend: HeatMap | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "image", as_picture(self.image))


def figure(
    rows: Sequence[Sequence[Panel | None]], *, title: str = "", note: str = "", side: int = 256
) -> Image.Image:
    """Set panels in rows.

    Args:
        rows: Rows of panels from top to bottom; None leaves a place empty.
        title: Text over all panels; "" leaves it out.
        note: Text under all panels, in small letters; "" leaves it out.
        side: Side of a panel's image in pixels, 64 or more; letters grow with it.

    Raises:
        ConfigError: No panel, or a side below 64.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns or side < 64:
        raise ConfigError(
            f"a figure needs a panel and sides of 64 pixels or more, got {columns} columns, {side}"
        )
    gap = side // 10
    width = columns * side + (columns + 1) * gap
    head = _Text(title, side // 9, _INK, width - 2 * gap)
    foot = _Text(note, side // 17, _FAINT, width - 2 * gap)
    layouts = [[_Layout(panel or Panel(), side) for panel in row] for row in rows]
    heights = [_row_height(row) for row in layouts]
    margins = (len(rows) + 1 + bool(title) + bool(note)) * gap
    canvas = Image.new("RGB", (width, head.height + sum(heights) + foot.height + margins), _PAPER)
    y = gap
    if title:
        head.draw(canvas, gap, y)
        y += head.height + gap
    for row, height in zip(layouts, heights, strict=True):
        title_height = max(layout.title.height for layout in row)
        for column, layout in enumerate(row):
            layout.draw(canvas, gap + column * (side + gap), y, title_height, _picture_height(row))
        y += height + gap
    foot.draw(canvas, gap, y)
    return canvas


def dot_chart(labels: Sequence[str], values: Sequence[float], *, side: int = 256) -> Image.Image:
    """Draw each value as a dot on a line from the lowest to the highest.

    The highest is drawn in another colour; the numbers stand beside. The picture is `side` pixels
    wide and at least as high.

    Raises:
        ConfigError: No value, or not one per label.
    """
    if not labels or len(labels) != len(values):
        raise ConfigError(f"got {len(labels)} labels for {len(values)} values; pass one for each")
    texts = [_Text(label, side // 17, _FAINT, side) for label in labels]
    numbers = [_Text(f"{value:.4f}", side // 17, _INK, side) for value in values]
    low, high = min(values), max(values)
    radius = max(1, side // 50)
    end = side - max(number.width for number in numbers) - 3 * radius
    used = sum(text.height for text in texts) + sum(number.height for number in numbers)
    space = max(0, (side - used) // len(texts))
    canvas = Image.new("RGB", (side, max(side, used)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    y = 0
    for text, number, value in zip(texts, numbers, values, strict=True):
        text.draw(canvas, 0, y)
        y += text.height
        middle = y + number.height // 2
        share = (value - low) / (high - low) if high > low else 0.5
        x = radius + round(share * (end - 2 * radius))
        draw.line((0, middle, end, middle), fill=_LINE, width=max(1, side // 128))
        dot = (x - radius, middle - radius, x + radius, middle + radius)
        draw.ellipse(dot, fill=_BEST if value == high else _INK)
        number.draw(canvas, side - number.width, y)
        y += number.height + space
    return canvas


class _Text:
    """Wrapped lines, measured before they are drawn."""

    def __init__(self, text: str, size: int, color: tuple[int, int, int], width: int) -> None:
        self._font = ImageFont.load_default(size)
        self._color = color
        self._lines = wrap(_drawable(text), self._font, width)
        self._line_height = round(size * 1.3)

    @property
    def height(self) -> int:
        return len(self._lines) * self._line_height

    @property
    def width(self) -> int:
        return max((round(self._font.getlength(line)) for line in self._lines), default=0)

    def draw(self, canvas: Image.Image, x: int, y: int) -> None:
        draw = ImageDraw.Draw(canvas)
        for index, line in enumerate(self._lines):
            draw.text((x, y + index * self._line_height), line, font=self._font, fill=self._color)


class _Layout:
    """A panel measured for a side."""

    def __init__(self, panel: Panel, side: int) -> None:
        self._panel, self._side, self._gap = panel, side, side // 25
        self.title = _Text(panel.title, side // 14, _INK, side)
        self._caption = _Text(panel.caption, side // 17, _FAINT, side)
        self._ends = [
            _Text(f"{end:.3g}", side // 17, _FAINT, side)
            for end in ((panel.legend.low, panel.legend.high) if panel.legend else ())
        ]

    @property
    def picture_height(self) -> int:
        return fitted(self._panel.image, self._side)[0] if self._panel.image else 0

    def below_title(self, picture_height: int) -> int:
        parts = [picture_height] if self._panel.image else []
        parts += [self._ends[0].height] if self._ends else []
        parts += [self._caption.height] if self._panel.caption else []
        return sum(parts) + (len(parts) - 1) * self._gap if parts else 0

    def draw(
        self, canvas: Image.Image, x: int, y: int, title_height: int, picture_height: int
    ) -> None:
        side = self._side
        self.title.draw(canvas, x, y + title_height - self.title.height)
        y += title_height + (self._gap if title_height else 0)
        if self._panel.image is not None:
            picture = _fit(self._panel.image, side)
            left, top = (side - picture.width) // 2, (picture_height - picture.height) // 2
            canvas.paste(picture, (x + left, y + top))
            y += picture_height + self._gap
        if self._panel.legend is not None:
            low, high = self._ends
            ramp = (side // 25, side - low.width - high.width - 2 * self._gap)
            low.draw(canvas, x, y)
            high.draw(canvas, x + side - high.width, y)
            middle = y + (low.height - ramp[0]) // 2
            canvas.paste(self._panel.legend.legend(ramp), (x + low.width + self._gap, middle))
            y += low.height + self._gap
        self._caption.draw(canvas, x, y)


def _row_height(row: Sequence[_Layout]) -> int:
    title_height = max(layout.title.height for layout in row)
    gap = row[0]._gap if title_height else 0
    height = _picture_height(row)
    return title_height + gap + max(layout.below_title(height) for layout in row)


def _picture_height(row: Sequence[_Layout]) -> int:
    """Height that the pictures of a row have in common: that of the highest."""
    return max(layout.picture_height for layout in row)


def fitted(image: Image.Image, side: int) -> tuple[int, int]:
    """(height, width) of the image in a panel: its longer side is `side`."""
    ratio = side / max(image.size)
    width, height = (max(1, round(edge * ratio)) for edge in image.size)
    return height, width


def _fit(image: Image.Image, side: int) -> Image.Image:
    """The image in a square: cells of small ones stay sharp, large ones are smoothed."""
    height, width = fitted(image, side)
    grows = side > max(image.size)
    method = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; words that are wider themselves are broken."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width and len(line) > 1:
                fitting = next(
                    n
                    for n in range(len(line) - 1, 0, -1)
                    if n == 1 or font.getlength(line[:n]) <= width
                )
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return lines


def _drawable(text: str) -> str:
    """The text in letters that the font has: accents are dropped, the rest becomes "?"."""
    plain = unicodedata.normalize("NFKD", text.translate(_SPELLINGS))
    letters = (letter for letter in plain if not unicodedata.combining(letter))
    return "".join(c if c.isascii() or c in "…·“”°" else "?" for c in letters)
