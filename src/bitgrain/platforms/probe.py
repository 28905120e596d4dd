"""Which platforms exist here: one module per platform beside this file, and the entry points `bitgrain.platforms`.

A platform module exports PLATFORM, a PlatformProbe; an entry point loads to one.  Nothing else lists platforms.
"""

from __future__ import annotations
