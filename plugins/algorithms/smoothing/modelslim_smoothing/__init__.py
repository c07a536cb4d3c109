# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithms for smoothing: SmoothQuant, searched scales and AWQ"""
