# SPDX-License-Identifier: Apache-2.0
"""The engine, and the runners that are policies over it."""
