"""Plots look alike whatever a user's matplotlibrc and the names in them say."""

from __future__ import annotations

from pathlib import Path

import collect as script
import matplotlib
from fmp_core.models.training import Epoch
from fmp_core.report.figures import LOSSES, training_curves
from fmp_core.results.bb_tables import history_frame, write_plots

MATPLOTLIBRC = {"text.usetex": True, "savefig.bbox": "tight", "lines.linewidth": 9, "axes.facecolor": "red"}


def test_a_users_own_style_changes_no_plot(root: Path) -> None:
    history = history_frame([(Epoch(0, 2, 3.5, 0.1), None), (Epoch(1, 2, 3.25, 0.2), None)])

    def drawn(place: Path) -> dict[str, bytes]:
        place.mkdir()
        write_plots(place, history)
        (place / "curves.svg").write_text(training_curves(history, LOSSES, "Loss", False))
        assert script.main([str(root), "--figure", str(place / "figure.svg")]) == 0
        return {path.name: path.read_bytes() for path in place.iterdir()}

    plain = drawn(root / "plain")
    with matplotlib.rc_context(MATPLOTLIBRC):
        assert drawn(root / "styled") == plain
    assert len(plain) == 4


def test_a_name_with_a_dollar_is_no_formula(root: Path) -> None:
    (root / "blended_cifar10").rename(root / "a$x^$b_cifar10")
    badnet = root / "badnet_cifar10"
    (badnet / "defense" / "clp").rename(badnet / "defense" / r"c$\frac$")
    assert script.main([str(root), "--figure", str(root / "out.svg")]) == 0
    assert (root / "out.svg").stat().st_size > 1000
