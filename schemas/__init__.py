# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas of the protocol, one per apiversion."""
