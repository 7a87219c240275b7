"""Video files as input and output of `darkroom predict`: frames as image files."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from datamodules.errors import UserError

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


def is_video(path: Path) -> bool:
    """Return whether the name of a file is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_frames(path: Path, folder: Path) -> tuple[list[Path], Fraction]:
    """Decode a video and write its frames to a folder as PNG files.

    Returns:
        The files in order, and the number of frames per second.

    Raises:
        UserError: the file is missing, damaged, or contains no video.
    """
    import av  # here, because all commands import this file

    files = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or Fraction(25)
            for i, frame in enumerate(container.decode(stream)):
                files.append(folder / f"{i:06d}.png")
                image = frame.to_image()
                if frame.rotation:  # of a video that was recorded with a rotated camera, in degrees counterclockwise
                    image = image.rotate(frame.rotation, expand=True)
                image.save(files[-1], compress_level=1)
    except (av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "no video stream"
        raise UserError(f"--input: {path} cannot be read as a video: {reason}. Check the file") from None
    if not files:
        raise UserError(f"--input: {path} has no frames. Check the file")
    return files, rate


def write_video(frames: Sequence[Path], rate: Fraction, path: Path) -> None:
    """Encode image files of one size as an H.264 video; an odd side loses its last row or column."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for i, file in enumerate(frames):
            with Image.open(file) as image:
                picture = image.convert("RGB").crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))
            if i == 0:
                stream.width, stream.height = picture.size
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
