# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip <command>``; one module for each command."""
