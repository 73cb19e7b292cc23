"""A stand-in for BackdoorBench's ``defense.base.defense`` where BackdoorBench is not installed: the same method names."""

from __future__ import annotations

import argparse
from typing import Any


class defense:  # noqa: N801 - BackdoorBench's name
    """The life cycle of a BB defense; every method is meant to be overridden."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        raise NotImplementedError

    def set_result(self, result_file: str) -> None:
        raise NotImplementedError

    def set_logger(self) -> None:
        raise NotImplementedError

    def mitigation(self) -> dict[str, Any]:
        raise NotImplementedError

    def defense(self, result_file: str) -> dict[str, Any]:
        raise NotImplementedError
