"""A shard filled with the features of its pictures: the loop around the model."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice

from diffenc.errors import ImageError
from diffenc.extraction.decoding import Decoded, decode_ahead, pictures_together
from diffenc.extraction.extractor import Extractor
from diffenc.extraction.listing import Listing
from diffenc.extraction.shards import Shard

_FLOAT = 4


def decoded_pictures(
    listing: Listing, extractor: Extractor, places: Iterable[int]
) -> Generator[Decoded]:
    """Pictures as the encoder takes them, decoded ahead by threads; close it to stop them."""
    prepare = extractor.prepare()
    return decode_ahead(
        places,
        lambda place: prepare(listing.picture(place)),
        threads=extractor.thread_count,
        ahead=extractor.batch_size,
        together=pictures_together(_FLOAT * 3 * math.prod(extractor.picture_size)),
    )


def fill(
    shard: Shard,
    decoded: Iterator[Decoded],
    count: int,
    listing: Listing,
    extractor: Extractor,
    step: Callable[[int], None],
) -> None:
    """Take pictures, run the model on whole batches of them, and put the rows into a shard.

    Args:
        shard: Shard that is filled.
        decoded: Pictures in order, see `decoded_pictures`.
        count: Number of pictures that are taken.
        listing: All pictures.
        extractor: What is read from them, and whether broken ones are skipped.
        step: Function that is called with the number of pictures that were dealt with.

    Raises:
        ImageError: A picture cannot be read and is not to be skipped.
    """
    batch: list[Decoded] = []
    waiting = 0
    for taken, each in enumerate(islice(decoded, count), start=1):
        waiting += 1
        if each.error is None:
            batch.append(each)
        elif extractor.skip_broken and isinstance(each.error, ImageError):
            shard.table.skipped.append((listing.ids[each.place], str(each.error)))
        else:
            raise each.error
        if len(batch) == extractor.batch_size or (taken == count and batch):
            _add(shard, batch, listing, extractor)
            batch = []
        if not batch:
            step(waiting)
            waiting = 0
    shard.close()


def _add(shard: Shard, batch: list[Decoded], listing: Listing, extractor: Extractor) -> None:
    places = [each.place for each in batch]
    prompts = None if listing.prompts is None else [listing.prompts[place] for place in places]
    rows = extractor.read([each.picture for each in batch], prompts)
    shard.add(rows, [listing.ids[place] for place in places], prompts)
