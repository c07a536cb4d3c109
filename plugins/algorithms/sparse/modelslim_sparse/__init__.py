# SPDX-License-Identifier: Apache-2.0
"""ModelSlim algorithms float_sparse and lowbit_sparse: weights that are made to be compressed"""
