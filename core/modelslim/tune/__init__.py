# SPDX-License-Identifier: Apache-2.0
"""Search for a protocol: trials that are quantized, judged and kept, proposed by a strategy."""
