"""Patches verl in the process that imports this: what its setting `external_lib` is for, which every Ray worker imports."""

from . import patch

patch("verl")
