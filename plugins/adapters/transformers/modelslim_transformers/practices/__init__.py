# SPDX-License-Identifier: Apache-2.0
"""Protocols for any model that transformers builds, one a file."""
