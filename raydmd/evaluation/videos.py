"""Frames to video files."""

import io
from fractions import Fraction

from PIL import Image

FPS = 16  # frames a second of the video models served here


def video(images: list[Image.Image], fps: int) -> bytes:
    """Return frames as an MP4 file (H.264); sides that are odd are cut by a pixel."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps))
        stream.width, stream.height = (side - side % 2 for side in images[0].size)
        stream.pix_fmt = "yuv420p"
        # x264's look ahead by macroblock trees reads what it never wrote in small frames: a seed's file would vary.
        stream.options = {"x264-params": "mbtree=0"}
        for image in images:
            frame = av.VideoFrame.from_image(image.convert("RGB").crop((0, 0, stream.width, stream.height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
