"""A flat buffer of the masks of an image, which are cropped, resized and flipped with it."""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from datamodules.transforms.objects import RunLengthCode, decode_masks, mask_boxes
from datamodules.transforms.to_device import to_device_async
from datamodules.transforms.window import Window, change_symmetry, source_positions

CHUNK = 2**23  # pixels of the masks that a device pastes at a time


class MaskBuffer:
    """Binary masks, cropped to their bounding boxes and concatenated in a flat buffer of pixels, on the CPU or on a device.

    Args:
        codes: masks of an image.
    """

    def __init__(self, codes: Sequence[RunLengthCode]) -> None:
        boxes = mask_boxes(codes).astype(int)
        parts = [np.zeros(1, np.uint8)]  # the first pixel stands for all pixels outside of the boxes
        for code, (left, top, right, bottom) in zip(codes, boxes.tolist(), strict=True):
            parts.append(decode_masks([code], *code["size"])[0, top:bottom, left:right].numpy().ravel())
        corners, lengths = boxes[:, [1, 0]], boxes[:, [3, 2]] - boxes[:, [1, 0]]
        offsets = np.cumsum([part.size for part in parts])[:-1, None]
        self.places = np.concatenate([corners, lengths, offsets], axis=1)  # int64 (M, 5): top, left, height, width, offset
        self.host_pixels = np.concatenate(parts)
        self.pixels = torch.from_numpy(self.host_pixels)

    def __len__(self) -> int:
        return len(self.places)

    def on_device(self, device: torch.device) -> "MaskBuffer":
        """Return a copy whose pixels are on a device; the boxes of cut masks are found on the CPU."""
        moved = copy(self)
        moved.pixels = self.pixels.to(device)
        return moved

    def boxes_within(self, ids: np.ndarray, window: Window) -> np.ndarray:
        """Return the bounding boxes of the parts of masks in a window, before it is resized and flipped.

        Args:
            ids: indices of masks, (M,).
            window: the window.

        Returns:
            float32 (M, 4): x1, y1, x2, y2 in the window; zeros for masks without pixels in it.
        """
        boxes = np.zeros((len(ids), 4), np.float32)
        for box, (top, left, height, width, offset) in zip(boxes, self.places[ids].tolist(), strict=True):
            first_row, first_column = max(window.top - top, 0), max(window.left - left, 0)
            part = self.host_pixels[offset : offset + height * width].view(bool).reshape(height, width)
            part = part[first_row : max(window.top + window.height - top, 0)]
            part = part[:, first_column : max(window.left + window.width - left, 0)]
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            if len(rows):
                y, x = top + first_row - window.top, left + first_column - window.left
                box[:] = x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1
        return boxes

    def paste(self, ids: np.ndarray, window: Window) -> Tensor:
        """Return masks in a window, resized to the nearest pixel and flipped as the image.

        Args:
            ids: indices of the masks, (M,).
            window: the window.

        Returns:
            uint8 (M, *window.final_shape).
        """
        if self.pixels.device.type != "cpu":
            return self.paste_on_device(ids, window)
        rows, columns = source_positions(window)
        masks = np.zeros((len(ids), *window.final_shape), np.uint8)
        placed = masks.transpose(0, 2, 1) if window.transposed else masks  # a view before the symmetry
        placed = placed[:, :: -1 if window.upside_down else 1, :: -1 if window.mirrored else 1]
        places = self.places[ids]
        corners, lengths = places[:, :2], places[:, 2:4]
        ends = np.concatenate([corners, corners + lengths], axis=1)
        limits = np.stack([rows.searchsorted(ends[:, ::2].T), columns.searchsorted(ends[:, 1::2].T)])  # (2, 2, M)
        rows_and_columns = zip(*limits.reshape(4, -1).tolist(), strict=True)
        for target, place, (y1, y2, x1, x2) in zip(placed, places.tolist(), rows_and_columns, strict=True):
            top, left, height, width, offset = place
            source = self.host_pixels[offset : offset + height * width].reshape(height, width)
            target[y1:y2, x1:x2] = source.take(rows[y1:y2] - top, 0).take(columns[x1:x2] - left, 1)
        return torch.from_numpy(masks)

    def paste_on_device(self, ids: np.ndarray, window: Window) -> Tensor:
        """Compute `paste` on the device of the pixels; two copies send the places of masks and pixels to it."""
        places = np.ascontiguousarray(self.places[ids].T)[..., None, None]
        top, left, height, width, offset = to_device_async(places, self.pixels.device)  # (M, 1, 1) each
        positions = to_device_async(np.concatenate(source_positions(window)), self.pixels.device)
        rows, columns = positions.split([window.new_height, window.new_width])
        masks = torch.empty(len(ids), window.new_height, window.new_width, dtype=torch.uint8, device=self.pixels.device)
        count = max(1, CHUNK // (window.new_height * window.new_width))
        for first in range(0, len(ids), count):  # some masks at a time, because positions have eight bytes
            part = slice(first, first + count)
            down, across = rows[:, None] - top[part], columns - left[part]  # (m, H, 1), (m, 1, W)
            is_inside = (down >= 0) & (down < height[part]) & (across >= 0) & (across < width[part])
            masks[part] = self.pixels[torch.where(is_inside, offset[part] + down * width[part] + across, 0)]
        return change_symmetry(masks, window)
