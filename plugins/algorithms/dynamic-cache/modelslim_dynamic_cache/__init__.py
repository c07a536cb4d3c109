# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithm dynamic_cache: key/value caches in int8 or float8"""
