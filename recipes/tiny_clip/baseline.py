# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The local-contrast baseline: how far each pixel is from its blurred surroundings."""

from __future__ import annotations

import cv2
import numpy as np


def local_contrast(images: np.ndarray, sigma: float = 12.0) -> np.ndarray:
    """``abs(x - blur(x))``, averaged over colours and lightly smoothed, ``[B, S, S]``; an image's score is its maximum.

    Args:
        images: uint8 ``[B, S, S, 3]``.
        sigma: Width of the blur in pixels.
    """
    maps = []
    for image in images.astype(np.float32) / 255:
        away = np.abs(image - cv2.GaussianBlur(image, (0, 0), sigma)).mean(2)
        maps.append(cv2.GaussianBlur(away, (0, 0), 2.0))
    return np.stack(maps)
