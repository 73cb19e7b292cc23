#!/usr/bin/env python3
"""Compare the speed of FRG ranking with the least it can cost and with the released code's scheme, in one run.

    python record_scripts/bench_frg.py --against released                        # random PreActResNet18 weights, random images
    python record_scripts/bench_frg.py --result_file badnet_cifar10 --against released --csv frg.csv

Figures (images/s unless named otherwise):

* ceiling_forward, ceiling_input_grad: a plain forward pass, and forward + input gradient, of the same model in the same dtype
  at the best of several batch sizes;
* engine_map: (map, image) pairs ranked per second, on an even sample of maps over all layers; shared forward passes are timed
  apart and count in the proportion of a full ranking;
* efficiency: least time over time measured. The least is, per map and image, one forward pass and one backward pass from the
  map's layer to the pixels, at the speeds of the ceilings (the input gradient times the share of multiplications up to there);
* released_map: the released scheme, written anew: per map two full forward passes, one backward, one inference, batch 32, fp32;
* ours_operations_per_map, released_operations_per_map: operations on the device (about as many kernel launches on a GPU) to
  rank all maps on ``--images`` images, per map. Counted without a GPU, on tensors without data: 512 images take minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.system.cli import Parser, run_main


def run(args: argparse.Namespace) -> None:
    from fmp_core.benchmark.measure import measure_all  # imports torch, which takes seconds

    table = measure_all(args)
    if args.csv:
        table.to_csv(args.csv, index=False)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("bench_frg", __doc__)
    parser.add_argument("--result_file", metavar="RECORD", help="take the weights of this attack record")
    parser.add_argument("--record_root", metavar="FOLDER", default="./record", help="default ./record")
    parser.add_argument(
        "--model", metavar="NAME", help="without --result_file: random weights of this model (default preactresnet18)"
    )
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="as for fmp.py")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--images", metavar="N", type=int, default=64, help="default 64")
    parser.add_argument("--maps", metavar="N", type=int, default=240, help="an even sample of so many feature maps (240)")
    parser.add_argument("--chunk", metavar="N", type=int, help="images per batch (default: what suits the device)")
    parser.add_argument("--memory", metavar="MIB", type=int, help="MiB that ranking may keep")
    parser.add_argument("--against", choices=["released"], help="also time the released scheme")
    parser.add_argument("--operations", action="store_true", help="also count operations per map, of both schemes")
    parser.add_argument("--training", action="store_true", help="also measure fine-tuning and testing")
    parser.add_argument("--repeat", metavar="N", type=int, default=1, help="measure N times; shows the median and the range")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write device,dtype,figure,value rows")
    args = parser.parse_args(argv)
    return run_main("bench_frg", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
