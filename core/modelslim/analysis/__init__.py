# SPDX-License-Identifier: Apache-2.0
"""What of a model suffers most from quantization: measured in one pass, with one unit resident, writing nothing."""
