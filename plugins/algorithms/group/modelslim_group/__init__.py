# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithm group: several processors as one entry"""
