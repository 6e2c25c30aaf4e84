"""What exists: pixels on disk and in memory, read window by window."""

from gigaxt.image.bands import open_bands
from gigaxt.image.base import Image, Level
from gigaxt.image.file_cache import cache_files
from gigaxt.image.open import open_image

__all__ = ["Image", "Level", "cache_files", "open_bands", "open_image"]
