"""Images that come with a request: verified, and bounded before anything of them is decoded."""

import io

from PIL import Image

from uellm.core.errors import InvalidArgumentError
from uellm.models.image_tokens import ImageSize

MEDIA_TYPES = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
"""What is taken, by the name that the image library has for it."""
MOST_IMAGES = 16
"""Of one request."""
MOST_BYTES = 8 << 20
MOST_PIXELS = 40_000_000
"""Width times height: decoded, 160 MB at most."""

_URLS = (b"http:", b"https:", b"data:", b"file:", b"ftp:", b"s3:", b"gs:")
_BASE64 = (b"iVBORw0KGgo", b"/9j/", b"UklGR", b"R0lGOD")
_REASON = "INVALID_IMAGE"

# Pixels are counted here, with an error of ours, once the header is read and nothing else.
Image.MAX_IMAGE_PIXELS = None


def check_count(count: int, field: str) -> None:
    """Refuse a request with too many images.

    Raises:
        InvalidArgumentError: naming field and limit.
    """
    if count > MOST_IMAGES:
        raise InvalidArgumentError(
            f"{field}: {count} images; at most {MOST_IMAGES} in one request: send fewer",
            field=field,
            reason="TOO_MANY_IMAGES",
        )


def read_image(data: bytes, media_type: str, field: str) -> ImageSize:
    """The size of an encoded image, which is whole and what it says it is. Blocks: for a thread.

    Args:
        data: the file.
        media_type: as its sender names it.
        field: where it came from, for errors.

    Raises:
        InvalidArgumentError: naming field, limit and remedy.
    """
    if media_type not in MEDIA_TYPES:
        allowed = ", ".join(MEDIA_TYPES)
        raise _refuse(f"{field}.media_type", f"{media_type[:80]!r} is none of {allowed}: convert")
    field = f"{field}.data"
    if not data:
        raise _refuse(field, "empty; send the image's file")
    if len(data) > MOST_BYTES:
        raise _refuse(field, f"{len(data)} bytes; at most {MOST_BYTES}: send a smaller image")
    if data[:8].lower().startswith(_URLS):
        raise _refuse(field, "a URL; nothing is fetched: send the bytes of the file themselves")
    if data.startswith(_BASE64):
        raise _refuse(field, "base64 text; send the bytes that it stands for")
    return _decoded(data, MEDIA_TYPES[media_type], field)


def _decoded(data: bytes, expected: str, field: str) -> ImageSize:
    try:
        # The decoder of what it is said to be and no other: fewer can be fooled.
        image = Image.open(io.BytesIO(data), formats=list(MEDIA_TYPES.values()))
    except Exception:  # decoders of foreign bytes raise whatever they like
        names = ", ".join(MEDIA_TYPES.values())
        raise _refuse(field, f"damaged, or no image that is one of {names}") from None
    with image:
        if image.format != expected:
            raise _refuse(
                field, f"it is {image.format}, and media_type says {expected}: name the right one"
            )
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise _refuse(
                field,
                f"{width} x {height} pixels; at most {MOST_PIXELS} in all: scale it down",
            )
        try:
            image.load()
        except Exception as error:  # see above
            raise _refuse(field, f"damaged or cut short ({error}); send all of it") from None
    return ImageSize(width, height)


def _refuse(field: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {problem}", field=field, reason=_REASON)
