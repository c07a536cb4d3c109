# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for Qwen3-VL-MoE, every hook written by hand"""
