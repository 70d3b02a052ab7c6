# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What every model with a frozen CLIP and a trained adapter shares.

:class:`~anomalib_fbclip.adapted.torch_model.AdaptedCLIP` is the base of the torch models,
:class:`~anomalib_fbclip.adapted.lightning_model.AdaptedModule` that of the Lightning modules.
"""
