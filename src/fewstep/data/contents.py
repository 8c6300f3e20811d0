"""By what pictures are known: a digest of all that they hold, which is found again without reading them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b

import numpy as np

from fewstep.data.cache import cache_path, steps, write_whole
from fewstep.data.files import Picture


def contents(pictures: Sequence[Picture]) -> str:
    """A digest of what the pictures hold, one after the other, whatever their names are and wherever they lie.

    They are read for it once; as long as their stamps are the same, the digest is taken from the cache folder.
    """
    known = cache_path("contents.txt", [picture.stamp for picture in pictures], __name__)
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", text := known.read_text()):
            return text
    digest = blake2b(digest_size=32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # files are read, and hashed, without the interpreter's lock
        for own in steps(pool.map(_digest, pictures), "reading pictures", len(pictures)):
            digest.update(own)
    text = digest.hexdigest()
    with suppress(OSError):  # whoever writes to the cache folder next warns
        write_whole(known, lambda file: file.write(text.encode()))
    return text


def _digest(picture: Picture) -> bytes:
    content = picture.content()
    kind = "a file"
    if isinstance(content, np.ndarray):
        kind, content = f"{content.dtype} {content.shape}", content.tobytes()
    elif isinstance(content, str):
        kind, content = "damaged", content.encode()
    digest = blake2b(kind.encode(), digest_size=32)
    digest.update(content)
    return digest.digest()
