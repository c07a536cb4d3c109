# SPDX-License-Identifier: Apache-2.0
"""ModelSlim saver for the AWQ format of vLLM and transformers"""
