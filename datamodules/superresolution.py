"""Super-resolution: training patches and full evaluation images, as in the papers' tables."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ResumableDataModule
from datamodules.batches import SuperResolutionBatch
from datamodules.errors import UserError
from datamodules.io.decoded_cache import decode_images
from datamodules.io.image_io import check_size, pixel_hash, read_image
from datamodules.io.image_refs import ImageRef, list_image_refs
from datamodules.superresolution_datasets import KERNEL_MARGIN, InMemoryPatches, SREvalImages, StreamedPatches, convert_pixels
from datamodules.transforms.blur import blur_inside, blur_radius
from datamodules.transforms.ragged_buffer import RaggedImageBuffer
from datamodules.transforms.resize import imresize


class SuperResolution(ResumableDataModule):
    """Pairs of a bicubically downscaled image and its original, luma or RGB.

    Yields `SuperResolutionBatch` with inputs of `patch_size`, and `SuperResolutionEvalBatch`, see `datamodules/batches.py`.

    Args:
        scale: upscaling factor.
        train: training images: a dataset of the catalog ("t91"), one of its splits ("photographs/train"), or a folder.
        val_every_nth: every n-th image of `train` is held out for validation; 0 for none.
        val: validation images, if none are held out from `train`.
        test: datasets to evaluate; absent ones are reported and skipped.
        channels: 1 for luma or 3 for RGB. Gray photographs are evaluated with one channel.
        blur: standard deviation in HR pixels of the Gaussian filter that training images pass before they are downscaled.
        batch_size: global batch size, over all devices.
        patch_size: side of a training patch in LR pixels, including the context of valid convolutions.
        border_overhang: LR pixels by which a patch may exceed its image; the image border is replicated.
        streaming: decode images on demand instead of keeping them in memory; use with `num_workers`.
        num_workers: loader processes; 0 is fastest for images in memory.
        skip_bad: skip unusable files and report their count instead of raising an error.
        seed: seed of the order and the positions of patches.
    """

    def __init__(
        self,
        scale: int,
        train: str,
        val_every_nth: NonNegativeInt = 0,
        val: str | None = None,
        test: Sequence[str] = (),
        channels: Literal[1, 3] = 1,
        blur: NonNegativeFloat = 0.0,
        batch_size: int = 16,
        patch_size: PositiveInt = 25,
        border_overhang: NonNegativeInt = 0,
        streaming: bool = False,
        num_workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, skip_bad)
        self.scale, self.train, self.val_every_nth, self.val, self.test = scale, train, val_every_nth, val, test
        self.channels, self.blur = channels, blur
        self.patch_size, self.border_overhang, self.streaming = patch_size, border_overhang, streaming
        if 2 * border_overhang >= patch_size:
            raise UserError(f"data.border_overhang: {border_overhang} must be less than half of data.patch_size: {patch_size}")
        self.margin = KERNEL_MARGIN + -(-blur_radius(blur) // scale)  # LR pixels around a patch that its pixels depend on

    # Setup

    def setup(self, stage: str) -> None:
        """Locate, read and validate the images of a stage.

        Raises:
            DatasetNotFound: a dataset is not installed.
            InvalidImage: files are unusable; the message names each of them.
            UserError: options are inconsistent.
        """
        if stage == "fit":
            self._setup_training()
        window = 11 + 2 * self.scale  # SSIM window plus the cropped border
        min_size = window + -window % self.scale  # images are cropped to multiples of the scale
        if stage in ("fit", "validate"):
            self.val_images = self._eval_images(self._val_refs(), min_size)
        if stage == "test":
            self.test_images = self._eval_images(self._load_test_sets(), min_size)

    def _eval_images(self, refs: Sequence[ImageRef], min_size: int) -> SREvalImages:
        return SREvalImages(self.data_report.validate(refs, min_size), self.scale, self.channels)

    def _setup_training(self) -> None:
        min_size = (self.patch_size - 2 * self.border_overhang) * self.scale
        refs = self._split_train()[0]
        patch_options = {
            "seed": self.seed,
            "size": (self.patch_size + 2 * self.margin) * self.scale,
            "grid": self.scale,
            "border_overhang": (self.border_overhang + self.margin) * self.scale,
        }
        self.patches: InMemoryPatches | StreamedPatches
        if self.streaming:
            files = [ref.path for ref in self.data_report.validate(refs, min_size, decode=False)]
            self.patches = StreamedPatches(files, self.channels, **patch_options)
        else:
            self.patches = InMemoryPatches(self._decode(refs, min_size), **patch_options)

    def _decode(self, refs: Sequence[ImageRef], min_size: int) -> RaggedImageBuffer:
        """Decode and validate training images."""

        def read(number: int) -> tuple[Tensor, str]:
            path = refs[number].path
            pixels = read_image(path)
            check_size(pixels.shape[-1], pixels.shape[-2], path, min_size)
            return convert_pixels(pixels, self.scale, self.channels).permute(1, 2, 0), pixel_hash(pixels)

        settings = f"multiples of {self.scale}, at least {min_size} pixels, {self.channels} channels"
        decoded = decode_images([ref.file for ref in refs], settings, read)
        self.data_report.add_results(refs, decoded.results)
        return decoded.buffer()

    def _split_train(self) -> tuple[list[ImageRef], list[ImageRef]]:
        """Return training images and held-out validation images."""
        refs = list_image_refs(self.train, self.scale)
        if not self.val_every_nth:
            return refs, []
        held_out = range(self.val_every_nth // 2, len(refs), self.val_every_nth)
        if not held_out:
            raise UserError(
                f"data.val_every_nth: {self.val_every_nth} is too large for {len(refs)} images. Use a smaller number"
            )
        return [ref for i, ref in enumerate(refs) if i not in held_out], [refs[i] for i in held_out]

    def _val_refs(self) -> list[ImageRef]:
        if self.val_every_nth:
            return [ref._replace(dataset=f"{ref.dataset}-holdout") for ref in self._split_train()[1]]
        if self.val is None:
            raise UserError(
                "data.val: no validation images. Set it to a dataset, or hold out training images with data.val_every_nth"
            )
        return list_image_refs(self.val, self.scale)

    def _load_test_sets(self) -> list[ImageRef]:
        return [ref for refs in self.read_test_sets(lambda spec: list_image_refs(spec, self.scale)) for ref in refs]

    # Loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return an infinite loader of uint8 patches (N, C, P, P); `on_after_batch_transfer` creates the pairs.

        P is (patch_size + 2 * margin) * scale.
        """
        return self.train_loader(self.patches, len(self.patches))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single validation images."""
        return self.eval_loader(self.val_images, len(self.val_images))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return a loader of single images of all test sets."""
        return self.eval_loader(self.test_images, len(self.test_images))

    # Batch processing on the device

    def prepare_train_batch(self, batch: dict[str, Any]) -> SuperResolutionBatch:
        """Create inputs and targets from uint8 patches (N, C, P, P), and crop the margin of the filters."""
        hr = batch["patches"].float() / 255
        blurred = blur_inside(hr, self.blur) if self.blur else hr
        size, margin = self.patch_size + 2 * self.margin, self.margin
        lr = imresize(blurred, (size, size))[..., margin:-margin, margin:-margin]
        margin *= self.scale
        return {"input": lr.contiguous(), "target": hr[..., margin:-margin, margin:-margin]}
