# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithm autoround_quant: rounding that is trained on the output of each unit"""
