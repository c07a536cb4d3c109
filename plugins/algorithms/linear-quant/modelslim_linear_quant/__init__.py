# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithm linear_quant: integer weights and activations"""
