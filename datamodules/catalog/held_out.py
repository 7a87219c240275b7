"""The images of a dataset that are held out for validation, and the names of its classes."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.catalog.catalog import HELD_OUT
from datamodules.catalog.masked_image import MaskedImage
from datamodules.errors import UserError
from datamodules.random.noise import uniform


class HeldOut:
    """A share of the images that is held out, the same for every seed and for every number of processes.

    The files are sorted by name and put in a random order. The first ones are held out, or those of a fold. All pages of a
    stack are in the same share.

    Args:
        fraction: share of the files; at least one file, and not all.
        fold: "K/N" for the K-th of N equal shares; None for `fraction`.

    Raises:
        UserError: the fold is not K/N with 1 <= K <= N and N >= 2.
    """

    def __init__(self, fraction: float, fold: str | None = None) -> None:
        self.fraction = fraction
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", fold) if fold is not None else None
        self.fold = (int(match[1]), int(match[2])) if match else None
        if fold is not None and not (self.fold and 1 <= self.fold[0] <= self.fold[1] and self.fold[1] >= 2):
            raise UserError(f"data.fold: {fold} is not K/N, the K-th of N shares, such as 1/5")

    def select(self, images: Sequence[MaskedImage], training: bool) -> list[MaskedImage]:
        """Return the images that are not held out, for training, or those that are, as the dataset `HELD_OUT`.

        Raises:
            UserError: there are too few files.
        """
        files = sorted({image.image.path for image in images})
        order = np.argsort(uniform(0, "held-out", range(len(files)), 1)[:, 0])
        share, shares = self.fold or (1, 0)
        if len(files) < max(2, shares):
            raise UserError(f"data.val: {len(files)} images are too few to hold some out. Use at least {max(2, shares)}")
        count = min(len(files) - 1, max(1, round(self.fraction * len(files))))
        chosen = order[share - 1 :: shares] if shares else order[:count]
        held_out = {files[i] for i in chosen}
        selected = [image for image in images if (image.image.path in held_out) != training]
        return selected if training else [image.in_dataset(HELD_OUT) for image in selected]


def read_class_names(names: Sequence[str] | str, count: int) -> tuple[str, ...]:
    """Return the names of the classes, from a list or from a text file with one name per line.

    Raises:
        UserError: the file cannot be read, or the number of names is not `count`.
    """
    if isinstance(names, str):
        try:
            names = [line.strip() for line in Path(names).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.class_names: the file {names} cannot be read: {error}") from None
    if names and len(names) != count:
        raise UserError(f"data.class_names: {len(names)} names. Give one for each of {count} classes, see data.num_classes")
    if len(set(names)) != len(names):
        raise UserError("data.class_names: two classes have the same name. Rename one of them")
    return tuple(names)
