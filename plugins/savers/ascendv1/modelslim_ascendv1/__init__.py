# SPDX-License-Identifier: Apache-2.0
"""ModelSlim saver for the ascendv1 format of vLLM-Ascend"""
