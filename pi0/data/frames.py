"""Camera frames in files: compressed images, and videos whose frames are found by their time."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from pi0.base.errors import MissingFileError
from pi0.base.files import why_unreadable
from pi0.data.demonstrations import DataError

# Every second frame is a key frame, as in LeRobot's own videos (configs/video.py): decoding needs at most one more.
KEYFRAME_EVERY = 2
# LeRobot's encoder settings are for AV1; at 18 the losses of H.264 cannot be seen.
H264_CRF = 18


def encode_png(frame: np.ndarray) -> bytes:
    """Encode a frame, uint8 [height, width, 3], without loss."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def decode_image(content: bytes | Path, where: str) -> np.ndarray:
    """An image file or its content as uint8 [height, width, 3]; `where` names it in errors.

    Raises:
        DataError: not an image.
        MissingFileError: no such file.
    """
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{where}: image {content!s} not found") from error
    except (UnidentifiedImageError, OSError) as error:
        why = why_unreadable(content, error) if isinstance(content, Path) else str(error)
        raise DataError(f"{where}: not an image that can be read: {why}") from error


def read_video(path: Path, times: np.ndarray, tolerance_s: float) -> np.ndarray:
    """The frames of a video at given times.

    Args:
        path: the video.
        times: seconds from the video's beginning, ascending, float [F].
        tolerance_s: largest distance of a frame from its time, seconds.
    Returns:
        uint8 [F, height, width, 3].
    Raises:
        MissingFileError: no such file.
        DataError: not a video, or no frame near one of the times.
    """
    if not path.is_file():
        raise MissingFileError(f"video {path} not found; perhaps the data set was not copied completely")
    found: list[np.ndarray] = []
    nearest = np.inf
    try:
        with av.open(str(path.absolute())) as container:  # a relative path with a colon would be a URL
            stream = container.streams.video[0]
            tick = float(stream.time_base or 0)
            # Seek to the key frame at or before the first frame needed; decoding starts there.
            container.seek(max(0, round(float(times[0]) / tick) - 1), stream=stream)
            for frame in container.decode(stream):
                at = (frame.pts or 0) * tick
                if abs(at - times[len(found)]) <= tolerance_s:
                    found.append(frame.to_ndarray(format="rgb24"))
                    nearest = np.inf
                    if len(found) == len(times):
                        break
                else:
                    nearest = min(nearest, abs(at - times[len(found)]))
                    if at > times[len(found)] + tolerance_s:
                        break
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: not a video that can be read: {why_unreadable(path, error)}") from error
    if len(found) < len(times):
        raise DataError(
            f"{path}: no frame within {tolerance_s} s of {times[len(found)]:.4f} s"
            + (
                f"; the nearest is {nearest:.4f} s away"
                if np.isfinite(nearest)
                else "; the video ends before"
            )
        )
    return np.stack(found)


class VideoWriter:
    """Writes episodes one after the other into one H.264 video, a frame every 1 / fps seconds.

    Args:
        path: the video.
        fps: frames a second.
        height, width: size of a frame in pixels, both even.

    Raises:
        DataError: a side is odd.
    """

    def __init__(self, path: Path, fps: int, height: int, width: int):
        if height % 2 or width % 2:
            raise DataError(f"frames of {height} x {width} cannot be a video; use even sides, or images")
        self.path, self.fps, self.frames = path, fps, 0
        self._container = av.open(str(path.absolute()), "w")  # as above
        options = {"crf": str(H264_CRF), "g": str(KEYFRAME_EVERY), "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    @property
    def seconds(self) -> float:
        """Length so far, which is the time of the next frame."""
        return self.frames / self.fps

    def write(self, frames: Iterable[np.ndarray]) -> None:
        """Append frames, uint8 [height, width, 3] each."""
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def close(self) -> None:
        """Finish the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
