"""scikit-learn's handwritten digits: real data that need no download."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image

from swincompress_pl.data.augmentation import ShiftRotate
from swincompress_pl.data.dataset import MemoryImages
from swincompress_pl.data.module import ImageClassificationData
from swincompress_pl.data.preprocessing import Preprocessing
from swincompress_pl.data.sampling import Indices, Purpose, derive_seed, stratified_sample

DIGITS_PREPROCESSING = Preprocessing(height=32, width=32, resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_BRIGHTEST = 16  # the digits count 0..16 dark pixels in 4 x 4 blocks


class Digits(ImageClassificationData):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as RGB of 32 x 32 (bicubic); nothing is downloaded.

    By default 1,257 images are for training, 180 are held out and 360 are for the test, all stratified by class. The
    data set has no official test images, so `seed` decides the test split as well. The splits and loaders are those of
    `ImageClassificationData`.

    Args:
        holdout: Part of the training images that is held out for decisions: a number of images (int, 1 or more) or a
            fraction (float in (0, 1)).
        test_images: Number of test images, 1 to 1,796.
        preprocessing: From an image to the network's input; None for 32 x 32 pixels, mean 0.5 and deviation 0.5.
        augmentation: What changes training images; None for nothing.
        batch_size: Images per batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Decides the three parts, order, augmentation and calibration sample; 0 or more.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        *,
        holdout: int | float = 180,
        test_images: int = 360,
        preprocessing: Preprocessing | None = None,
        augmentation: ShiftRotate | None = ShiftRotate(),  # noqa: B008  (frozen)
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            preprocessing=preprocessing or DIGITS_PREPROCESSING,
            augmentation=augmentation,
            holdout=holdout,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if not 1 <= test_images < 1797:
            raise ValueError(f"test_images is {test_images}; there are 1797 digits, give 1 to 1796.")
        self.test_images = test_images
        self.class_names = tuple(str(digit) for digit in range(10))

    def _training_source(self) -> MemoryImages:
        images = self._images
        return _take(images, np.setdiff1d(np.arange(len(images.labels)), self._test_positions))

    def _test_source(self) -> MemoryImages:
        return _take(self._images, self._test_positions)

    @cached_property
    def _images(self) -> MemoryImages:
        from sklearn.datasets import load_digits

        digits = load_digits()
        gray = np.rint(digits.images * (255 / _BRIGHTEST)).astype(np.uint8)
        pixels = np.repeat(gray[..., None], 3, axis=-1)
        if self.preprocessing.resize is not None:  # once, and not at every request
            images = (self.preprocessing.resized(Image.fromarray(image)) for image in pixels)
            pixels = np.stack([np.asarray(image) for image in images])
        return MemoryImages(pixels, digits.target.astype(np.int64))

    @cached_property
    def _test_positions(self) -> Indices:
        return stratified_sample(self._images.labels, self.test_images, derive_seed(self.seed, Purpose.TEST))


def _take(images: MemoryImages, positions: Indices) -> MemoryImages:
    return MemoryImages(images.pixels[positions], images.labels[positions])
