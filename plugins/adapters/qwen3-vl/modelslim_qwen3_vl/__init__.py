# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for Qwen3-VL, Qwen3-VL-MoE and Qwen2.5-VL"""
