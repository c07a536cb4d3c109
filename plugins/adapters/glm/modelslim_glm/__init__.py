# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for GLM-4.5, 4.6 and 4.7, with and without vision"""
