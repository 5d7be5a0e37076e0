"""The colours of the plots, told apart with any kind of sight and on white as on black.

References:
    Okabe, Ito: Color Universal Design. 2008. Nuñez, Anderton, Renslow: Optimizing colormaps with
    consideration for color vision deficiency. PLOS ONE 13(7), 2018.
"""

from __future__ import annotations

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#8a94a3"

NORM_MAP = "viridis"
"""Colours of norms, dark to bright."""

RELATIVE_MAP = "BrBG_r"
"""Colours of norms over the typical one: green below it, brown above."""

# The pink that is furthest from both maps, black and white for all four kinds of sight; the usual
# magenta #ff00aa cannot be told from the middle of viridis by those who do not see green.
NONFINITE = "#FF33FF"
ZERO = "#000000"
NO_GRADIENT_GREY = "#c3cad4"

OPTIMIZERS = (BLUE, GREEN, PURPLE, SKY)
"""By optimizer the colour of its norm before the clip."""

BEFORE, AFTER, THRESHOLD = BLUE, ORANGE, VERMILLION

LANES = {
    "nan": NONFINITE,
    "inf": NONFINITE,
    "overflow": PURPLE,
    "not applied": GREY,
    "exploding": VERMILLION,
    "spike": ORANGE,
    "vanishing": BLUE,
    "no_gradient": SKY,
    "accumulate": GREEN,
    "dropped": GREY,
    "out_of_memory": VERMILLION,
}
"""By kind of event, and for steps that were not applied, the colour of its lane."""
