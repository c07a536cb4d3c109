# SPDX-License-Identifier: Apache-2.0
"""ModelSlim saver for the compressed-tensors format of vLLM and transformers"""
