"""How plots look: as matplotlib's own defaults say, whatever a user's ``matplotlibrc`` holds (``text.usetex``, say)."""

from __future__ import annotations

from typing import Any

import matplotlib.style

# A "$" in a name is a "$"; the same SVG each time.
DEFAULTS: list[Any] = ["default", {"text.parse_math": False, "svg.hashsalt": "fmp"}]
PLAIN = matplotlib.style.context(DEFAULTS)  # a decorator for what draws or saves a plot
