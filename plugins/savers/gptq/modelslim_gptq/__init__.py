# SPDX-License-Identifier: Apache-2.0
"""ModelSlim saver for the GPTQ format of GPTQModel, transformers and vLLM"""
