# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for Qwen3-VL-MoE, in a few lines upon the generic one"""
