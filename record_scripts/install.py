#!/usr/bin/env python3
"""Put FMP into a BackdoorBench checkout, or take it out again.

    python record_scripts/install.py --into ~/BackdoorBench            # copies; --link makes symbolic links instead
    python record_scripts/install.py --into ~/BackdoorBench --uninstall

adds ``defense/fmp.py``, ``defense/fmp_core/``, ``config/defense/fmp/`` and ``record_scripts/``, and no more. A file that is not
ours is never overwritten. If it is killed, the same command, or ``--uninstall``, finishes the work.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.backdoorbench.install import install, listed, uninstall
from fmp_core.backdoorbench.workspace import find_checkout
from fmp_core.system.cli import Parser, if_it_ends_early, run_main


@if_it_ends_early("FMP's files may be there in part")
def run(args: Namespace) -> None:
    root = find_checkout(args.into)
    if args.uninstall:
        stay = uninstall(root, args.force)
        print(f"FMP was taken out of {root}." + (f" Kept, not empty: {listed(stay)}." if stay else ""))
    else:
        count = install(root, link=args.link, force=args.force)
        print(f"FMP is in {root} ({count} {'links' if args.link else 'files'}). From there: python defense/fmp.py")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("install", __doc__)
    parser.add_argument("--into", required=True, metavar="DIR", help="root of a BackdoorBench checkout")
    parser.add_argument("--link", action="store_true", help="symbolic links to this project instead of copies")
    parser.add_argument("--uninstall", action="store_true", help="take FMP out again")
    parser.add_argument("--force", action="store_true", help="discard changes made to FMP's files in the checkout")
    args = parser.parse_args(argv)
    return run_main("install", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
