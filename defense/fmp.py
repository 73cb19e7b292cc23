#!/usr/bin/env python3
"""Adversarial Feature Map Pruning (FMP, ICLR 2024) as a BackdoorBench defense.

    python defense/fmp.py --result_file badnet_cifar10

reads ``record/badnet_cifar10/attack_result.pt``, removes the backdoor and writes ``record/badnet_cifar10/defense/fmp/``.
One run, top to bottom: record -> ranking -> pruning -> fine-tuning -> evaluation -> report.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pprint import pformat
from typing import Any, NoReturn

HERE = Path(__file__).absolute().parent  # not resolved: a link in a BackdoorBench checkout belongs there
for folder in (HERE, HERE.parent):  # fmp_core lies beside this file; BackdoorBench's own packages lie one level up
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402
from fmp_core.data.attack_record import AttackRecord, find_records, read_attack_record, write_defense_result  # noqa: E402
from fmp_core.data.clean_subset import choose_subset  # noqa: E402
from fmp_core.data.datasets import Split, dataset_facts, open_split  # noqa: E402
from fmp_core.errors import UserError  # noqa: E402
from fmp_core.inversion.trigger import INVERTED_TRIGGER, InvertedTrigger, save_trigger  # noqa: E402
from fmp_core.inversion.verdict import Evidence  # noqa: E402
from fmp_core.models.build import PixelModel, load_model, state_like  # noqa: E402
from fmp_core.models.evaluate import (  # noqa: E402
    Metrics,
    Predictions,
    TestData,
    defense_effectiveness_rating,
    evaluate_and_keep,
    to_unit,
)
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers  # noqa: E402
from fmp_core.models.pruning import prune_feature_maps  # noqa: E402
from fmp_core.repair.distillation import Teacher  # noqa: E402
from fmp_core.repair.finetune import FineTuning  # noqa: E402
from fmp_core.repair.unlearning import Unlearning  # noqa: E402
from fmp_core.report.page import write_report  # noqa: E402
from fmp_core.results import run_folder  # noqa: E402
from fmp_core.results.event_log import summary_writer, write_events  # noqa: E402
from fmp_core.results.outcome import Outcome  # noqa: E402
from fmp_core.results.predictions import prediction_frame  # noqa: E402
from fmp_core.selection.select import Selector  # noqa: E402
from fmp_core.settings import Settings, add_arguments, load_settings  # noqa: E402
from fmp_core.storage.files import check_folders, make_folders, refuse_links_out_of, write_text, writing  # noqa: E402
from fmp_core.storage.lock import locked  # noqa: E402
from fmp_core.system import distributed  # noqa: E402
from fmp_core.system.devices import choose_device, is_out_of_memory, make_deterministic  # noqa: E402
from fmp_core.system.interrupts import Terminated, stopping_gently  # noqa: E402
from fmp_core.system.logs import LogFile  # noqa: E402

try:
    from defense.base import defense
except ImportError:  # no BackdoorBench around us
    from fmp_core.bb_base import defense

UNCHANGED = "earlier results are unchanged"  # what a run that ends early may say
LOG_FORMAT = logging.Formatter("%(asctime)s [%(levelname)-8s] [%(filename)s:%(lineno)d] %(message)s", "%Y-%m-%d:%H:%M:%S")


class FMP(defense):
    """BB's life cycle: ``FMP(args).defense("badnet_cifar10")`` returns ``{"model": module, "metrics": dict}``.

    Args:
        args: a namespace (or mapping) of settings, as :meth:`add_arguments` parses them; what is absent or None comes from
            the YAML file ``yaml_path`` or the defaults.

    Raises:
        UserError: a setting is unknown or impossible; later, the record or the data is not usable.
    """

    def __init__(self, args: argparse.Namespace | dict[str, Any] | None = None):
        given = args if isinstance(args, dict) else vars(args) if args else {}
        self.settings = load_settings(given)
        self.compute = distributed.join(choose_device(self.settings.device))
        self.seconds: dict[str, float] = {}
        self.stage = "load"
        self.kept = UNCHANGED
        self.chosen_by: str | None = None  # what chose the maps, where it is not FMP (ablations)
        self.logger = logging.getLogger("fmp_core")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)

    def set_result(self, result_file: str) -> None:
        """Read the record, its model and all images; nothing is written yet, so bad input leaves no trace."""
        settings = self.settings
        self.seconds, self.kept = {}, UNCHANGED  # an FMP may defend several records
        if settings.tensorboard:
            summary_writer()  # refuse now rather than after an hour
        with self._timed("load"):
            record = read_attack_record(Path(settings.record_root) / result_file)
            self._check_against(record)
            facts = dataset_facts(record.dataset, record.image_size)
            train_set = open_split(settings.dataset_path, record.dataset, True, record.image_size)
            test_set = open_split(settings.dataset_path, record.dataset, False, record.image_size)
            for split in (train_set, test_set):
                _check_labels(split, record)
            self.subset = choose_subset(len(train_set), settings.ratio, settings.random_seed, settings.index)
            if settings.epochs and len(self.subset) < 2:
                raise UserError("Fine-tuning needs at least 2 clean images, not 1; raise --ratio or add to --index.")
            device = self.compute.device
            poisoned = record.bd_test.pixels(record.image_size).to(device)  # first: their size is a stranger's claim
            network = load_model(record.model_name, record.num_classes, record.state)
            self.model = PixelModel(network, facts).to(device).to(memory_format=torch.channels_last)
            self.clean_images = train_set.read(self.subset).to(device)
            self.clean_labels = train_set.labels[self.subset].to(device)
            self.test_data = TestData(
                test_set.read(range(len(test_set))).to(device),
                test_set.labels.to(device),
                poisoned,
                record.bd_test.targets.to(device),
                record.bd_test.true_labels(test_set).to(device),
            )
            self.layers = self._trace(network, record)
        self.predictions: list[Predictions] = []  # before, and of the latest test
        self.record, self.facts = record, facts
        self.folder = record.folder / "defense" / settings.defense_name
        self.log_folder = Path(settings.log or self.folder / "log")
        self.checkpoints = Path(settings.checkpoint_save or self.folder / "checkpoint")
        self.shared = record.folder / "defense" / "fmp"  # its cache of scores serves all --defense_name
        own = [self.folder / name for name in ("log", "checkpoint", "tensorboard")]
        refuse_links_out_of(record.folder, *own, self.shared / "cache")

    def set_logger(self) -> None:
        """Log to the console and to ``log/<time>.log``, in BB's format; of several processes only the first speaks."""
        if not distributed.is_leader():
            self.logger.setLevel(logging.ERROR)
            return
        log_folder = self.log_folder
        make_folders(log_folder, self.checkpoints)
        for handler in list(self.logger.handlers):
            self.logger.removeHandler(handler)
            handler.close()
        stamp = time.strftime("%Y_%m_%d_%H_%M_%S")
        with writing(log_folder / f"{stamp}.log"):
            log_file = LogFile(log_folder / f"{stamp}.log")
        for handler in (log_file, logging.StreamHandler()):
            handler.setFormatter(LOG_FORMAT)
            self.logger.addHandler(handler)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.info(pformat({**dataclasses.asdict(self.settings), "terminal_info": sys.argv}))
        self.logger.info(pformat(run_folder.versions()))
        write_text(log_folder / "index.txt", self._index())  # where BB's ft keeps it, which has no results yet either

    def mitigation(self) -> dict[str, Any]:
        """Rank, prune, fine-tune, evaluate, write. The poisoned test set is only ever evaluated on."""
        make_deterministic()
        selector = self.selector()
        scores, evidence = selector.look(self.record.num_classes)
        if not distributed.is_leader():  # one process goes on from here
            return {"model": self.model.network, "metrics": {}}
        before = self._test("before")
        triggers = selector.reverse(evidence)
        choice = selector.choose(scores, triggers[0] if triggers else None)
        unlearning = self._unlearning(selector, triggers)
        teacher = self._teacher(evidence)
        prune_feature_maps(self.layers, choice.by_layer(self.layers))
        pruned, total = int(choice.mask.sum()), len(choice.mask)
        self.logger.info("pruned %d of %d feature maps; %d tied at a cut, where the margin decided", pruned, total, choice.ties)
        fine_tuning = self._fine_tuning()
        if self.settings.epochs:
            tested = self.seconds["testing"]
            with self._timed("fine-tuning"):
                history = fine_tuning.run(choice if self.settings.masked else None, unlearning, teacher)
            self.seconds["fine-tuning"] -= self.seconds["testing"] - tested
        else:
            history = [(None, self._test("pruned"))]
        outcome = Outcome(scores, evidence, triggers, choice, before, history)
        metrics = self._metrics(outcome)
        self._write(outcome, metrics)
        self.model.eval()
        if self.settings.epochs:  # without, the state of another, interrupted run may lie there
            fine_tuning.forget()
        return {"model": self.model.network, "metrics": metrics}

    def defense(self, result_file: str) -> dict[str, Any]:
        self.set_result(result_file)
        check_folders(self.folder, self.log_folder, self.checkpoints)
        with locked(self.folder, self.settings.wait) if distributed.is_leader() else nullcontext():
            self.set_logger()
            return self.mitigation()

    def _check_against(self, record: AttackRecord) -> None:
        """A flag that contradicts the record is an error, not a silent override."""
        facts = dataset_facts(record.dataset, record.image_size)
        if facts.num_classes not in (None, record.num_classes):
            raise UserError(
                f"The record says {record.num_classes} classes, but {record.dataset} has {facts.num_classes}; it is damaged."
            )
        if facts.size != record.image_size:
            raise UserError(
                f"The record says images of {record.image_size}, but {record.dataset} has {facts.size}; it is damaged."
            )
        stored = {"dataset": record.dataset, "model": record.model_name, "num_classes": record.num_classes}
        for key, value in stored.items():
            given = getattr(self.settings, key)
            if given not in (None, value):
                raise UserError(f"{key} is set to {given}, but the record in {record.folder} has {value}; leave --{key} out.")

    def _trace(self, network: torch.nn.Module, record: AttackRecord) -> list[ConvLayer]:
        """The layers FMP ranks; also shows, before anything is written, that the model takes images of this size."""
        try:
            return trace_conv_layers(network, to_unit(self.clean_images[:1]))
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"{record.model_name} cannot take the record's {record.image_size} images ({detail}).") from None

    def selector(self) -> Selector:
        """What finds the maps to prune: it is given clean images only."""
        return Selector(self.model, self.layers, self.clean_images, self.clean_labels, self.settings, self.shared, self._timed)

    def _unlearning(self, selector: Selector, triggers: Sequence[InvertedTrigger]) -> Unlearning | None:
        if self.settings.unlearn and self.settings.selection != "trigger":
            self.logger.warning("--unlearn has no effect without --selection trigger, which finds the trigger to unlearn")
        return Unlearning(selector.trigger_search(), triggers) if self.settings.unlearn and triggers else None

    def _teacher(self, evidence: Evidence | None) -> Teacher | None:
        """The model as it is: called before it is pruned."""
        suspect = evidence.target if evidence and evidence.backdoored else None
        wanted = self.settings.distill and self.settings.epochs
        return Teacher.copy_of(self.model, self.settings.distill, suspect) if wanted else None

    def _fine_tuning(self) -> FineTuning:
        return FineTuning(
            self.model,
            self.layers,
            self.clean_images,
            self.clean_labels,
            self.settings,
            self.compute,
            self.facts,
            self.checkpoints,
            self._test,
            lambda path: write_defense_result(path, *self._weights()),
        )

    def _test(self, when: str) -> Metrics:
        with self._timed("testing"):
            metrics, predictions = evaluate_and_keep(self.model, self.test_data, self.settings.batch_size)
        self.predictions = [*self.predictions[:1], predictions]
        self.logger.info("%s: Acc %.4f  ASR %.4f  RA %.4f", when, metrics.test_acc, metrics.test_asr, metrics.test_ra)
        return metrics

    def _metrics(self, outcome: Outcome) -> dict[str, Any]:
        """The content of metrics.json."""
        choice = outcome.choice
        return {
            "before": outcome.before.headline(),
            "after": outcome.after.headline(),
            "der": defense_effectiveness_rating(outcome.before, outcome.after),
            "record": self.record.folder.name,
            "dataset": self.record.dataset,
            "model": self.record.model_name,
            "clean_images": len(self.subset),
            "frg_images": outcome.scores.samples if outcome.scores else 0,
            "feature_maps": len(choice.mask),
            "pruned": int(choice.mask.sum()),
            "tied_at_cut": choice.ties,
            "verdict": outcome.evidence.as_dict() if outcome.evidence else None,
            "chosen_by": self.chosen_by,
            "seconds": self.seconds,
            "seed": self.settings.random_seed,
            "device": f"{self.compute.device} ({self.compute.name})",
            "settings": dataclasses.asdict(self.settings),
            "versions": run_folder.versions(),
        }

    def _write(self, outcome: Outcome, metrics: dict[str, Any]) -> None:
        """All results; metrics.json, which says that the others are there, comes last of those the report reads."""
        self.kept = "new results are partly written"
        write_text(self.folder / "index.txt", self._index())  # where BB's fp keeps it
        frame = run_folder.history_frame(outcome.history)
        run_folder.write_csv(self.folder / "fmp_df.csv", frame)
        run_folder.write_csv(self.folder / "fmp_df_summary.csv", run_folder.summary_frame(frame))
        run_folder.write_plots(self.folder, frame)
        if self.settings.tensorboard:
            write_events(self.folder / "tensorboard" / time.strftime("%Y_%m_%d_%H_%M_%S"), frame)
        maps = run_folder.feature_map_frame(self.layers, outcome.choice, outcome.scores, self.settings.scope)
        run_folder.write_csv(self.folder / "feature_maps.csv", maps, index=False)
        predictions = prediction_frame(self.test_data, *self.predictions)
        run_folder.write_csv(self.folder / "predictions.csv", predictions, index=False)
        if outcome.triggers:
            save_trigger(self.folder / INVERTED_TRIGGER, outcome.triggers[0])
        else:
            (self.folder / INVERTED_TRIGGER).unlink(missing_ok=True)  # of an earlier run
        write_defense_result(self.folder / "defense_result.pt", *self._weights())
        run_folder.write_json(self.folder / "metrics.json", metrics)
        self.kept = "all results but the report are written"
        self.logger.info("results are in %s", self.folder)
        if self.settings.report:
            started = time.perf_counter()
            path = write_report(self.record, self.folder, self.test_data)
            self.logger.info("%s written in %.1f s", path, time.perf_counter() - started)

    def _index(self) -> str:
        return "".join(f"{position}\n" for position in self.subset)

    def _weights(self) -> tuple[str, int, dict[str, torch.Tensor]]:
        return self.record.model_name, self.record.num_classes, state_like(self.model.network, self.record.state)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        outer, self.stage = self.stage, stage
        yield
        self.stage = outer  # not after an error, which belongs to the inner one
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _check_labels(split: Split, record: AttackRecord) -> None:
    labels = split.labels.tolist()
    if not labels or not 0 <= min(labels) <= max(labels) < record.num_classes:
        raise UserError(
            f"Dataset {record.dataset} must have images labelled 0..{record.num_classes - 1} as the record's model, but has "
            f"{len(labels)} images{f' labelled up to {max(labels)}' if labels else ''}; check --dataset_path."
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fmp: {message}; --help lists the flags.\n")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="fmp", description="Remove a backdoor with Adversarial Feature Map Pruning.", allow_abbrev=False)
    FMP.add_arguments(parser)
    args = parser.parse_args(argv)
    method = None
    try:
        method = FMP(args)
        if method.settings.result_file is None:
            print(_what_to_run(method.settings))
            return 2
        with stopping_gently():
            result = method.defense(method.settings.result_file)
    except (UserError, OSError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        sentence, code = _ending(error, method)
        print(f"fmp: {sentence}", file=sys.stderr)
        return code
    finally:
        distributed.leave()
    metrics = result["metrics"]
    if metrics:
        print(f"\n{run_folder.table(metrics)}\n\nDER {metrics['der']:.4f}   results: {method.folder}")
    return 0


def _ending(error: BaseException, method: FMP | None) -> tuple[str, int]:
    """What to say of ``error``, and the exit code; errors that are nobody's input are raised again.

    ``method`` is None if it could not be made.
    """
    kept = method.kept if method else UNCHANGED
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} failed ({error.strerror or error}); {kept}.", 2
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated)
        again = "the same command" + (" without --fresh" if method and method.settings.fresh else "")
        how, code = ("terminated", 143) if terminated else ("interrupted", 130)
        return f"{how}; {kept}. Run {again} again to go on from here.", code
    if is_out_of_memory(error):
        less = {"ranking": "lower --chunk or --memory", "fine-tuning": "lower --batch_size"}
        stage = method.stage if method else "load"
        what = less.get(stage, "close what else uses it")
        return f"out of memory ({stage}); {what}, or choose another --device; {kept}.", 2
    raise error


def _what_to_run(settings: Settings) -> str:
    names = find_records(settings.record_root)
    listing = "".join(f"\n    python defense/fmp.py --result_file {name}" for name in names)
    found = (
        f"Records in {settings.record_root}:{listing}" if names else f"There are no attack records in {settings.record_root}."
    )
    return (
        f"fmp: --result_file is missing. {found}\nTo make the demo record: python record_scripts/make_record.py (or: make demo)"
    )


if __name__ == "__main__":
    sys.exit(main())
