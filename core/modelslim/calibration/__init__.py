# SPDX-License-Identifier: Apache-2.0
"""Calibration sets that ship with ModelSlim; found by file name through an entry point."""
