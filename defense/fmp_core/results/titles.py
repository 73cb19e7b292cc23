"""Names as tables and figures show them."""

from __future__ import annotations

ATTACK_TITLES = {
    "badnet": "BadNets",
    "blended": "Blended",
    "lf": "Low Frequency",
    "ssba": "SSBA",
    "ssba_like": "SSBA-like",
    "wanet": "WaNet",
    "sig": "SIG",
}
ALL_TO_ALL = " all-to-all"  # ends the name of an attack on all classes at once
AVERAGE = "AVG"  # stands for an attack in the rows over all


def printable(text: object) -> str:
    """``text`` without control characters: names come from folders that others made, and terminals obey escapes."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def attack_title(name: str) -> str:
    """An attack's name as papers write it; an unknown one as it is, without control characters."""
    attack = name.removesuffix(ALL_TO_ALL)
    return printable(ATTACK_TITLES.get(attack, attack) + ALL_TO_ALL * (attack != name))
