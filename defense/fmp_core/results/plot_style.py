"""How plots look: as matplotlib's own defaults say, whatever a user's ``matplotlibrc`` holds (``text.usetex``, say)."""

from __future__ import annotations

import matplotlib.style

# Use as a decorator of what draws or saves a plot. Names of records and defenses are shown as they are, also with a "$".
PLAIN = matplotlib.style.context(["default", {"text.parse_math": False, "svg.hashsalt": "fmp"}])
