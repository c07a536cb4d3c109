# SPDX-License-Identifier: Apache-2.0
"""What each version of an inference engine loads, one JSON file per version."""
