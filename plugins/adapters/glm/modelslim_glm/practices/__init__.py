# SPDX-License-Identifier: Apache-2.0
"""Protocols for models of this family, one a file."""
