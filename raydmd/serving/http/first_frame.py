"""The first frame that a request for a video brings: a file, or a data URL, as pixels of the video's size."""

import base64
import binascii
import io

from PIL import Image, UnidentifiedImageError

from raydmd.data.pictures import read_picture
from raydmd.serving.contract import Size
from raydmd.serving.http.errors import ApiError
from raydmd.serving.settings import Limits

FIELD = "input_reference"
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's names; told by the content, whatever a file is called
KINDS = "a PNG, JPEG or WebP"


def first_frame_bytes(reference: str | dict[str, str], limits: Limits) -> bytes:
    """Return the file of a first frame that JSON has: as a data URL, in Base64, or as OpenAI's object of one.

    Raises:
        ApiError: 400, it is none of these; 413, it is too large.
    """
    if isinstance(reference, dict):
        if set(reference) != {"image_url"}:
            raise _refused("an object with image_url alone, or the file itself; none are kept here by file_id")
        reference = reference["image_url"]
    text = reference.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _refused("a data URL in Base64 is needed (data:image/png;base64,...)")
    elif "://" in text[:20]:
        raise _refused("addresses are not fetched here; send the file, or a data URL")
    check_size(3 * (len(text) // 4) - text[-2:].count("="), limits)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refused("it is neither a data URL nor a file in Base64") from None


def check_size(size: int, limits: Limits) -> None:
    """Let a file pass that is not too large.

    Raises:
        ApiError: 413.
    """
    if size > limits.image_bytes:
        raise _refused(f"at most {limits.image_bytes} bytes, not {size}", "image_too_large", 413)


def first_frame_pixels(data: bytes, size: Size, limits: Limits) -> bytes:
    """Return a file's picture as `contract.GenerationRequest.first_frame`: resized and cut as `raydmd generate` does.

    It is decoded here: how many pixels it has is known from its header, before room is made for them.

    Raises:
        ApiError: 400, it is no picture, or has too many pixels; 413, it is too large.
    """
    check_size(len(data), limits)
    width, height = size
    try:
        return read_picture(io.BytesIO(data), (3, height, width), FORMATS, limits.image_pixels).tobytes()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _refused(f"at most {limits.image_pixels} pixels", "image_too_large") from None
    except UnidentifiedImageError:
        raise _refused(f"it is not {KINDS} picture") from None
    except Exception as error:  # whatever Pillow's decoders make of bytes that are not what they expect
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise _refused(f"it cannot be read as {KINDS} picture: {told}") from None


def _refused(message: str, code: str = "invalid_value", status: int = 400) -> ApiError:
    return ApiError(status, f"{FIELD}: {message}", FIELD, code)
