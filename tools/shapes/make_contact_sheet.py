"""Draw the contact sheet of the documentation: scenes of the miniature world with a caption each.

python tools/shapes/make_contact_sheet.py
python tools/shapes/make_contact_sheet.py --pictures --output docs/assets/shapes-pictures.png
"""

import argparse
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffenc.shapes.captions import captions
from diffenc.shapes.picture_texts import picture_caption
from diffenc.shapes.pictures import render_pictures, sample_picture_scenes
from diffenc.shapes.render import render
from diffenc.shapes.scenes import sample_scenes

COLUMNS, SIDE, GAP, TEXT_HEIGHT, LINE = 6, 128, 16, 44, 14
PAPER, INK, FRAME = (255, 255, 255), (60, 60, 60), (205, 205, 205)


def of_shapes(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Pictures at 64 pixels, each pixel twice as wide and high, and a caption of each."""
    return [
        (render(scene).resize((SIDE, SIDE), Image.Resampling.NEAREST), text)
        for number, scene in enumerate(sample_scenes(count, seed=seed))
        for text in captions(scene, 1, seed=number)
    ]


def of_pictures(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Scenes of little pictures, and a caption of each."""
    return [
        (render_pictures(scene, SIDE), picture_caption(scene, random.Random(f"{seed}/{number}")))
        for number, scene in enumerate(sample_picture_scenes(count, seed=seed))
    ]


def contact_sheet(scenes: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in rows, with captions below."""
    rows = -(-len(scenes) // COLUMNS)
    cell_height = SIDE + TEXT_HEIGHT
    size = (COLUMNS * (SIDE + GAP) + GAP, rows * (cell_height + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for number, (picture, text) in enumerate(scenes):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (SIDE + GAP), GAP + row * (cell_height + GAP)
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
        for index, line in enumerate(textwrap.wrap(text, width=24)):
            draw.text((x, y + SIDE + 4 + index * LINE), line, fill=INK, font=font)
    return sheet


def main() -> None:
    """Draw the first scenes of a seed, none chosen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("docs/assets/shapes-world.png"))
    parser.add_argument("--pictures", action="store_true", help="scenes of little pictures")
    options = parser.parse_args()
    draw = of_pictures if options.pictures else of_shapes
    sheet = contact_sheet(draw(options.count, options.seed))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"{options.output}: {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    main()
