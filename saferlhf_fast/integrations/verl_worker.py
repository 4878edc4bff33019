"""Patches verl in the process that imports this.

VERL_USE_EXTERNAL_MODULES=saferlhf_fast.integrations.verl_worker makes verl import it wherever verl is
imported: in the driver, which computes advantages, and in Ray's workers.
"""

from . import patch

patch("verl")
