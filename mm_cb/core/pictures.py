"""What reading a damaged picture can raise, written once; `image_attacks` has its own, because it stands alone."""

import struct

from PIL import Image

UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, NotImplementedError, MemoryError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""Pillow raises these for files that are no whole picture; the last one only where warnings are errors."""
