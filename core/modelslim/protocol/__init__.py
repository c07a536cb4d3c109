# SPDX-License-Identifier: Apache-2.0
"""The YAML protocol: text to a document with positions, to a schema's verdict, to frozen values."""
