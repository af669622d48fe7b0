"""The images of a dataset: found below its folder, proved to be readable, stored once under the hash of their bytes."""

from __future__ import annotations

import hashlib
import os
import warnings
from io import BytesIO
from pathlib import Path

from configs.datasets import IMAGES_FOLDER
from tasks.dataset_fields import RowRefusedError, wrong_type
from tasks.dataset_reading import describe, excerpt

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 50_000_000
IMAGE_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
FILE_SUFFIXES = (*IMAGE_SUFFIXES.values(), ".jpeg")


class ImageFolder:
    """Takes the images that rows refer to, from below `root`; copies each different one to `target`, if given."""

    def __init__(self, root: Path, target: Path | None = None) -> None:
        self._root, self._target = root.resolve(), target
        self._taken: dict[str, str] = {}
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """How many different images were taken."""
        return len(self._names)

    def take(self, reference: object, field: str) -> str:
        """The image's path from the folder of the rows. Raises RowRefusedError for one that is not there or no image.

        `reference` is a path, an object with an `imageId` (DeepExtension), or one with `bytes` (Parquet).
        """
        if isinstance(reference, dict) and isinstance(reference.get("bytes"), bytes):
            return self._keep(reference["bytes"], field)
        if isinstance(reference, dict):
            reference = reference.get("imageId", reference.get("path"))
        if not isinstance(reference, str):
            raise wrong_type(field, reference, "the path of an image")
        path = self._find(reference, field)
        if str(path) not in self._taken:
            self._taken[str(path)] = self._keep(_read(path, field), field)
        return self._taken[str(path)]

    def _find(self, reference: str, field: str) -> Path:
        if "://" in reference or reference.startswith("data:"):
            what = f"{excerpt(reference)} is an address, and nothing is fetched"
            raise _refused("image_not_a_file", field, what, "the path of a file beside the rows")
        given = Path(reference)
        names = [given, Path(IMAGES_FOLDER) / given]
        if given.suffix.lower() not in FILE_SUFFIXES:
            names += [name.with_name(name.name + suffix) for name in names for suffix in FILE_SUFFIXES]
        for name in names:
            try:
                path = (self._root / name).resolve()
                found = path.is_file()
            except (OSError, ValueError):  # a name too long, or with a NUL
                continue
            if not path.is_relative_to(self._root):
                what = f"{excerpt(reference)} lies outside"
                raise _refused("image_outside", field, what, "a path inside the folder of the dataset")
            if found:
                return path
        raise _refused("image_missing", field, f"no file {excerpt(reference)}", "the path of an image file")

    def _keep(self, data: bytes, field: str) -> str:
        name = f"{IMAGES_FOLDER}/{hashlib.sha256(data).hexdigest()}"
        name += _suffix(data, field)
        if name not in self._names and self._target is not None:
            (self._target / IMAGES_FOLDER).mkdir(exist_ok=True)
            with (self._target / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the version, once it has its name, is whole
        self._names.add(name)
        return name


def _read(path: Path, field: str) -> bytes:
    size = path.stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise _refused("image_too_large", field, f"{size:,} bytes", f"at most {MAX_IMAGE_BYTES:,} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused("image_unreadable", field, str(error.strerror), "an image that may be read") from None


def _suffix(data: bytes, field: str) -> str:
    """Decode the image to its last pixel and return the suffix of its format."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=list(IMAGE_SUFFIXES))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _refused("image_too_large", field, f"{width} x {height} pixels", f"at most {MAX_PIXELS:,} pixels")
        image.load()
        return IMAGE_SUFFIXES[str(image.format)]
    except UnidentifiedImageError:
        expected = f"an image: {', '.join(IMAGE_SUFFIXES)}"
        raise _refused("image_unreadable", field, "a file that is none of them", expected) from None
    except Image.DecompressionBombError:
        raise _refused("image_too_large", field, "too many pixels", f"at most {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _refused("image_unreadable", field, describe(str(error)), "a whole image") from None


def _refused(kind: str, field: str, found: str, expected: str) -> RowRefusedError:
    return RowRefusedError(
        kind,
        f"the image cannot be used: {found}",
        field=field,
        found=found,
        expected=expected,
        mend="mend the image or its path, or remove the row",
    )
