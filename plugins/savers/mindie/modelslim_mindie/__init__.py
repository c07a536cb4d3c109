# SPDX-License-Identifier: Apache-2.0
"""ModelSlim saver for the format of MindIE-SD"""
