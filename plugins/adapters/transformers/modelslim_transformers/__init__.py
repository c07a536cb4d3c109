# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for any transformers language or multimodal model"""
