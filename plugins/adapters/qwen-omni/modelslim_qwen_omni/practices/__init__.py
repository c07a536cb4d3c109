# SPDX-License-Identifier: Apache-2.0
"""Protocols for the models of this adapter"""
