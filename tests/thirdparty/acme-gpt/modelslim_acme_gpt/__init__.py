# SPDX-License-Identifier: Apache-2.0
"""ModelSlim adapter for Acme's GPT"""
