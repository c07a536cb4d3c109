# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for any decoder-only transformers model"""
