# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for DeepSeek models from V2 to V3.2"""
