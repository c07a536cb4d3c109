# SPDX-License-Identifier: Apache-2.0
"""Part of the import paths that adapters of the existing tool use."""
