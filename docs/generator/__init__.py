# SPDX-License-Identifier: Apache-2.0
"""What makes the reference pages, one module for each kind of fact; the pages themselves lie beside it."""
