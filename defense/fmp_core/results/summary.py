"""The content of ``metrics.json``: the one place that says which keys it has. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fmp_core.errors import UserError
from fmp_core.metrics import HEADLINES, METRICS
from fmp_core.results.removal import DIVERGED, OUTCOMES
from fmp_core.results.values import is_of_type, read_json
from fmp_core.storage.files import write_json

MUCH_ACCURACY = 0.03
ADVISE_MORE_BELOW = 500


VERDICT = {  # Verdict.as_dict writes it
    **{"backdoored": bool, "target": int | str, "family": str, "success": list[float], "success_all_to_all": float},
    **{"lead": float, "held_out": int, "too_few": bool},
}


@dataclass(frozen=True)
class RunSummary:
    """What one run of FMP came to; a field is a key of ``metrics.json`` (docs/outputs.md). Metrics are fractions in [0,1]."""

    before: dict[str, float | None]  # None, here and in DER: there is no triggered image
    after: dict[str, float | None]
    der: float | None
    record: str
    dataset: str
    model: str
    clean_images: int  # of the clean subset
    frg_images: int  # that maps were scored on; 0: none was
    feature_maps: int
    pruned: int
    tied_at_cut: int
    verdict: dict[str, Any] | None  # of trigger inversion
    chosen_by: str | None  # the command that selected the maps, if it was not FMP (ablations)
    seconds: dict[str, float]  # by stage
    seed: int
    device: str
    settings: dict[str, Any]
    versions: dict[str, str]
    reused: list[str] = field(default_factory=list)  # stages of which an earlier run did all or a part, see Stages
    cpu_seconds: float | None = None  # of all threads of the process, which read, computed and tested
    test_images: int | None = None  # None: all
    attack_result: str | None = None  # SHA-256 of the record's attack_result.pt
    attack_figures: dict[str, float] | None = None  # ``before`` as the attack reported it
    removal: dict[str, Any] | None = None  # see removal.attack_outcome
    warnings: list[str] = field(default_factory=list)  # sentences for the reader of the results

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        """Write readable JSON, whole or not at all."""
        write_json(path, self.as_dict())

    @staticmethod
    def read(path: Path) -> RunSummary:
        """What :meth:`write` wrote and no other key. Raises UserError: the file is missing or damaged, or lacks a key."""
        names = [field.name for field in dataclasses.fields(RunSummary)]
        try:
            content = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; run the defense again.") from None
        if missing := [name for name in names if name not in content]:
            raise UserError(f"{path} is not what a run of fmp writes: it lacks {', '.join(missing)}; run the defense again.")
        wrong = [name for name, kind in get_type_hints(RunSummary).items() if not is_of_type(content[name], kind)]
        wrong += [name for name in ("before", "after") if name not in wrong and not set(METRICS) <= content[name].keys()]
        if not (content["verdict"] is None or wrong or _is_verdict(content["verdict"])):
            wrong = ["verdict"]
        if wrong:
            raise UserError(f"{path} is not what a run of fmp writes: see {', '.join(wrong)} there; run the defense again.")
        return RunSummary(**{name: content[name] for name in names})


def _is_verdict(content: dict[str, Any]) -> bool:
    if not all(name in content and is_of_type(content[name], kind) for name, kind in VERDICT.items()):
        return False
    return content["target"] == "all-to-all" or content["target"] in range(len(content["success"]))


def as_table(metrics: dict[str, Any], folder: Path) -> str:
    """What the terminal shows at the end: Acc / ASR / RA in percent, before and after, and advice where it is due.

    ``metrics`` is the content of metrics.json.
    """
    lines = ["", f"{'percent':<16}" + "".join(f"{HEADLINES[name]:>8}" for name in METRICS)]
    for row in ("before", "after"):
        shares = (metrics[row][name] for name in METRICS)
        lines += [f"{row + ' FMP':<16}" + "".join(f"{'-':>8}" if share is None else f"{100 * share:8.2f}" for share in shares)]
    if metrics["test_images"]:
        lines.append(f"on an even sample of at most {metrics['test_images']} images of each test set")
    der = "" if metrics["der"] is None else f"DER {100 * metrics['der']:.2f} %   "
    lines += ["", f"{der}results: {folder}"]
    return "\n".join([*lines, *advice(metrics)])


def is_high_price(drop: float) -> bool:
    """Whether more clean accuracy was lost than ``MUCH_ACCURACY``, of which rounding is no part."""
    return drop > MUCH_ACCURACY + 1e-9


def advice(metrics: dict[str, Any]) -> list[str]:
    """At most one line: what to try if the backdoor is still there, or if accuracy was lost."""
    removal, clean = metrics["removal"], metrics["clean_images"]
    drop = metrics["before"]["test_acc"] - metrics["after"]["test_acc"]
    few = f" The defense had {clean} clean images only: give it more (--ratio, --index)." if clean < ADVISE_MORE_BELOW else ""
    if removal["outcome"] == DIVERGED:
        return [f"{OUTCOMES[DIVERGED, True]}: try a smaller --lr."]
    if removal["outcome"] in ("weakened", "still works"):
        strong = metrics["settings"]["preset"] == "strong"
        tuned = "try more clean data (--ratio) or a higher --lr" if metrics["settings"]["epochs"] else "leave out --epochs 0"
        attempt = tuned if strong else "try --preset strong"
        return [f"{OUTCOMES[removal['outcome'], removal['certain']]}: {attempt}.{few}"]
    if is_high_price(drop):
        by_budget = (metrics.get("verdict") or {}).get("backdoored")
        pruning_less = f"a {'smaller --budget' if by_budget else 'larger --p'}, or some --epochs"
        less = "a smaller --lr or fewer --epochs" if metrics["settings"]["epochs"] else pruning_less
        return [f"Accuracy fell by {100 * drop:.1f} points: try {less}.{few}"]
    return []
