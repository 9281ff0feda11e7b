"""Videos as H.264 mp4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT = 24  # pixels


def write_video(path: str | Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Write frames, uint8 [height, width, 3] with even sides, as an mp4 that browsers play."""
    if not frames:
        raise ValueError(f"no frames to write to {path}")
    height, width = frames[0].shape[:2]
    # In a relative path a colon would end the name of a protocol.
    with av.open(str(Path(path).absolute()), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def captioned(frames: Sequence[np.ndarray], text: str) -> list[np.ndarray]:
    """Return the frames, uint8 [height, width, 3], with `text` in a white strip of 24 pixels above each."""
    strip = Image.new("RGB", (frames[0].shape[1], CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, 4), text, fill="black", font=ImageFont.load_default(14))
    return [np.concatenate([np.asarray(strip), frame]) for frame in frames]
