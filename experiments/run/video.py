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
            expected = container.duration / av.time_base if container.duration else 0.0  # seconds
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
    if len(files) / rate < 0.9 * expected - 0.5:  # the sound may be longer than the pictures
        raise UserError(f"--input: {path} ends after {float(len(files) / rate):.1f} of {expected:.1f} s. Replace the file")
    return files, rate


def write_video(frames: Sequence[Path], rate: Fraction, path: Path) -> None:
    """Encode image files of one size as an H.264 video; an odd side loses its last row or column.

    Raises:
        UserError: the video cannot be written, or is too large for H.264.
    """
    import av

    part = path.with_suffix(".part.mp4")
    try:
        _encode(frames, rate, part)
        part.replace(path)
    except (av.FFmpegError, OSError) as error:
        part.unlink(missing_ok=True)
        with Image.open(frames[0]) as image:
            size = f"{image.width}x{image.height}"
        reason = f"--output: cannot write {path} with {size} pixels: {error.strerror}"
        raise UserError(f"{reason}. Is the disk full, or a side longer than 16384 pixels?") from None


def _encode(frames: Sequence[Path], rate: Fraction, path: Path) -> None:
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
