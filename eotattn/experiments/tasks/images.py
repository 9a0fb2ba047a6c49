"""Images: classification at a base resolution, and the same images again with more pixels.

Legend: B batch, N images, H rows, W columns of pixels, Ch channels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eotattn.checks import check_choice, check_installed, check_positive_int, require
from eotattn.experiments.tasks.batches import Batch, step_generator
from eotattn.experiments.tasks.parts import check_open

__all__ = ["DIGITS", "FolderImages", "ImageSource", "ImageTask", "StoredImages", "load_digits", "open_images"]

#: Name of the images that scikit-learn brings along: 1797 handwritten digits of 8 x 8 pixels.
DIGITS = "digits"
#: Parts of the split.
PARTS = ("train", "validation", "held_out")
#: Endings of the files that an image folder is searched for.
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


class ImageSource(ABC):
    """Labelled images that can be had at any resolution.

    Attributes:
        labels: (N,) int64.
        class_names: One a label.
    """

    labels: Tensor
    class_names: tuple[str, ...]

    @abstractmethod
    def pixels(self, indices: Tensor, size: int) -> Tensor:
        """Images as (B, Ch, size, size) float32 in [0, 1]."""
        raise NotImplementedError

    @abstractmethod
    def digest(self) -> str:
        """A hash that identifies the images and their labels."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class StoredImages(ImageSource):
    """Images in memory; other sizes are interpolated (bilinear, without aligned corners, smoothed when smaller).

    Args:
        images: (N, Ch, H, W) float32 in [0, 1].
        labels: (N,) int64.
        class_names: One a label.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def pixels(self, indices: Tensor, size: int) -> Tensor:
        """Interpolated images."""
        found = self.images[indices]
        if found.shape[-2:] == (size, size):
            return found
        smooth = size < min(found.shape[-2:])
        return functional.interpolate(found, size=(size, size), mode="bilinear", antialias=smooth)

    def digest(self) -> str:
        """Of all pixels."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class FolderImages(ImageSource):
    """Images in files, read when they are asked for: the largest square in the middle, resized (bilinear, smoothed).

    Args:
        files: N paths.
        labels: (N,) int64.
        class_names: One a label.
    """

    files: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    @classmethod
    def scan(cls, folder: str | Path) -> FolderImages:
        """Find ``folder/<class>/**/<image>``, the layout of ImageNet, in a fixed order."""
        check_installed("FolderImages", "data", "PIL")
        root, remedy = Path(folder), "Pass a folder with one folder of images a class"
        require(root.is_dir(), "FolderImages", "folder", "be a folder that exists", str(folder), remedy)
        classes = sorted(path for path in root.iterdir() if path.is_dir())
        found = {path.name: sorted(f for f in path.rglob("*") if f.suffix.lower() in _ENDINGS) for path in classes}
        names = tuple(name for name, files in found.items() if files)
        require(len(names) > 1, "FolderImages", "folder", "hold images of two classes", list(names), remedy)
        labels = torch.tensor([k for k, name in enumerate(names) for _ in found[name]])
        return cls(tuple(file for name in names for file in found[name]), labels, names)

    def pixels(self, indices: Tensor, size: int) -> Tensor:
        """Read, cropped and resized images, three channels."""
        return torch.stack([_read(self.files[int(index)], size) for index in indices])

    def digest(self) -> str:
        """Of the names and sizes of all files."""
        listed = "".join(f"{file.parent.name}/{file.name} {file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256(listed.encode()).hexdigest()


def _read(file: Path, size: int) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as raw:
            image = raw.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        message = f"FolderImages: every file must be a whole image; got {file.name} ({error}). Remove or replace it."
        raise ValueError(message) from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(resized, dtype=np.float32) / 255).movedim(-1, 0)


def load_digits() -> StoredImages:
    """The digits of scikit-learn, real handwriting, (1797, 1, 8, 8).

    Source:
        Alpaydin and Kaynak 1998, the test set of *Optical Recognition of Handwritten Digits* (UCI).
    """
    check_installed("load_digits", "experiments", "sklearn")
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    return StoredImages(images, torch.from_numpy(digits.target).long(), tuple(str(k) for k in range(10)))


def open_images(corpus: str) -> ImageSource:
    """The images of ``"digits"``, or of a folder of one folder a class."""
    return load_digits() if corpus == DIGITS else FolderImages.scan(corpus)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Classification of images; fixed random parts of them are held out, for choices and for the last word.

    Args:
        source: The images.
        size: Rows and columns of a training image, pixels.
        max_shift: Training images are shifted by up to this many pixels up, down, left and right; what comes in is 0.
        held_out_percent: Share of the images that neither training nor any choice sees, 1 to 98.
        validation_percent: Share of the images that training never sees, for choices; the two add up to less than 100.

    Example:
        >>> images = StoredImages(torch.rand(20, 1, 4, 4), torch.arange(20) % 2, ("even", "odd"))
        >>> ImageTask(images, size=4).batch(3, seed=0, step=0).inputs.shape
        torch.Size([3, 1, 4, 4])
    """

    source: ImageSource
    size: int
    max_shift: int = 0
    held_out_percent: int = 20
    validation_percent: int = 10

    def __post_init__(self) -> None:
        check_positive_int("ImageTask", "size", self.size)
        check_positive_int("ImageTask", "max_shift", self.max_shift, minimum=0)
        shares = ("held_out_percent", "validation_percent")
        for share in shares:
            check_positive_int("ImageTask", share, getattr(self, share))
        together = self.held_out_percent + self.validation_percent
        require(together < 100, "ImageTask", " + ".join(shares), "be below 100", together, "Use e.g. 20 and 10")
        counts = tuple(len(self.indices(part)) for part in PARTS)
        require(min(counts) > 0, "ImageTask", "source", "have images in all parts of the split", counts, "Use more")

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.source.class_names)

    def indices(self, part: str) -> Tensor:
        """Indices of the ``"train"``, ``"validation"`` or ``"held_out"`` images: the same ones at every call."""
        check_choice("ImageTask", "part", part, PARTS)
        count = len(self.source.labels)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        held_out = count * self.held_out_percent // 100
        seen = held_out + count * self.validation_percent // 100
        return {"held_out": order[:held_out], "validation": order[held_out:seen], "train": order[seen:]}[part]

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What identifies the data."""
        return {"sha256": self.source.digest(), "images": len(self.source.labels)}

    def batch(self, batch_size: int, *, seed: int, step: int) -> Batch:
        """Draw training images at random, shifted at random.

        Returns:
            A :class:`Batch` of (B, Ch, size, size) float32 pixels and (B,) int64 labels.
        """
        generator = step_generator(seed, step)
        train = self.indices("train")
        chosen = train[torch.randint(len(train), (batch_size,), generator=generator)]
        pixels = self.source.pixels(chosen, self.size)
        return Batch(self._shifted(pixels, generator), self.source.labels[chosen])

    def _shifted(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        if self.max_shift == 0:
            return pixels
        padded = functional.pad(pixels, (self.max_shift,) * 4)
        starts = torch.randint(2 * self.max_shift + 1, (2, len(pixels), 1), generator=generator)
        rows, columns = (start + torch.arange(self.size) for start in starts)
        image = torch.arange(len(pixels))[:, None, None]
        return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()

    def batches_of(self, part: str, size: int, batch_size: int) -> Iterator[Batch]:
        """All images of a part once, read as they are asked for."""
        if part == "held_out":
            check_open("ImageTask.batches_of")
        check_positive_int("ImageTask.batches_of", "size", size)
        check_positive_int("ImageTask.batches_of", "batch_size", batch_size)
        for indices in self.indices(part).split(batch_size):
            yield Batch(self.source.pixels(indices, size), self.source.labels[indices])
