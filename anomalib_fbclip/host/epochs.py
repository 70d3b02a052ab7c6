# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""How long a model trains where the user's trainer does not say it."""

import logging

from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

_LIGHTNING_DEFAULT = 1000
"""Cannot be told from no limit."""


def limit_epochs(trainer: Trainer, epochs: int) -> None:
    """Train for a model's own number of epochs, unless the trainer limits epochs or steps.

    Args:
        trainer: Trainer of the run that begins.
        epochs: The model's own number.
    """
    if trainer.max_steps == -1 and trainer.fit_loop.max_epochs in {None, _LIGHTNING_DEFAULT}:
        trainer.fit_loop.max_epochs = epochs
        logger.info(
            "Training for %d epochs; --trainer.max_epochs sets another number (1000, which is Lightning's default "
            "and has no effect here, by --model.max_epochs).",
            epochs,
        )
