# SPDX-License-Identifier: Apache-2.0
"""The foreign distribution's own tests run where it is installed: in the environment that test_wheel.py makes."""

collect_ignore = ["acme-gpt"]
