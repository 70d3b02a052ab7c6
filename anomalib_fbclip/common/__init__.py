# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What every room uses: checks of arguments, tensor functions, files that are written whole."""
