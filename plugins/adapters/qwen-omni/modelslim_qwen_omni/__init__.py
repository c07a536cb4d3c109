# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for the thinker of Qwen2.5-Omni and Qwen3-Omni"""
