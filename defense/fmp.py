#!/usr/bin/env python3
"""Adversarial Feature Map Pruning (FMP, ICLR 2024) as a BackdoorBench defense.

    python defense/fmp.py --result_file badnet_cifar10

reads ``record/badnet_cifar10/attack_result.pt``, removes the backdoor and writes ``record/badnet_cifar10/defense/fmp/``.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).absolute().parent  # not resolved: a link in a BackdoorBench checkout belongs there
for folder in (HERE, HERE.parent):  # fmp_core lies beside this file; BackdoorBench's own packages lie one level up
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
if "fmp_core" not in sys.modules:  # another FMP may be installed, too; the library beside this file is ours
    sys.path.insert(0, str(HERE))
    import fmp_core  # noqa: F401

    sys.path.remove(str(HERE))

if __name__ == "__main__":  # flags are parsed, and --help is answered, before torch is loaded, which takes seconds
    from fmp_core.command import main

    sys.exit(main())

import argparse
import dataclasses
import logging
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from fmp_core.errors import UserError
from fmp_core.inputs import describe, load_inputs
from fmp_core.metrics import in_percent
from fmp_core.models.evaluate import Evaluation, Metrics, evaluate
from fmp_core.models.pruning import prune_feature_maps
from fmp_core.repair.finetune import FineTuning
from fmp_core.report.page import write_report
from fmp_core.results.run_folder import History, RunFolder
from fmp_core.selection.choice import Selection, check_selection
from fmp_core.selection.select import Select, select_feature_maps
from fmp_core.settings import add_arguments, load_settings, unused
from fmp_core.storage.lock import locked
from fmp_core.system import distributed, logs
from fmp_core.system.cli import Stages, if_it_ends_early
from fmp_core.system.devices import as_in_a_fresh_process
from fmp_core.system.progress import Progress
from fmp_core.system.versions import versions

try:
    from defense.base import defense
except ImportError:  # no BackdoorBench around us
    defense = object

LOGGER = logging.getLogger("fmp_core")
RUNNING = threading.Lock()


class FMP(defense):
    """BB's life cycle: ``FMP(args).defense("badnet_cifar10")`` returns ``{"model": module, "metrics": dict}``.

    Args:
        args: a namespace or mapping of settings, as :meth:`add_arguments` parses them; what is absent or None comes from the
            YAML file ``yaml_path`` or the defaults.
        select: what selects the feature maps to prune, from clean images only. Another one makes an ablation.

    Raises:
        UserError: a setting is unknown or impossible; later, the record or the data is not usable.
    """

    def __init__(self, args: argparse.Namespace | Mapping[str, Any] | None = None, select: Select = select_feature_maps):
        self.settings = load_settings(args if isinstance(args, Mapping) else vars(args) if args else {})
        self.device = distributed.join(self.settings.device)
        self.select = select
        self.stages = Stages()
        versions()  # as they are now

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)

    @as_in_a_fresh_process()
    def set_result(self, result_file: str) -> None:
        """Read the record, its model and all images; nothing is written yet, so bad input leaves no trace."""
        self.settings = dataclasses.replace(self.settings, result_file=result_file)  # which the results tell
        self.stages = Stages()  # an FMP may defend several records
        with self.stages("load"):
            self.inputs = load_inputs(self.settings, result_file, self.device.device)
        self.folder = RunFolder.of(self.settings, self.inputs.record.folder)
        self.evaluations: list[Evaluation] = []  # before, and the latest

    def set_logger(self) -> None:
        """Make the result folder, then log to the terminal and, in BB's format, to ``log/<time>.log``.

        Of several processes only the first does.
        """
        if not distributed.is_leader():
            return logs.silence()
        self.folder.make(self.inputs.subset)
        logs.set_up(self.folder.log, self.settings)
        for line in describe(self.inputs, self.settings, self.device):
            LOGGER.info(line)
        other = self.select is not select_feature_maps  # may use whatever trigger inversion and ranking do
        for sentence in unused(self.settings, "trigger" if other else self.settings.selection):
            LOGGER.warning(sentence)

    @as_in_a_fresh_process()
    def mitigation(self) -> dict[str, Any]:
        """Algorithm 1: rank the feature maps, prune the lowest, fine-tune. The poisoned test set is only ever evaluated on."""
        if self.evaluations:  # called again: the model is no longer the attacked one
            self.set_result(str(self.settings.result_file))
        settings, defender = self.settings, self.inputs.defender
        if distributed.is_leader():
            self.evaluate("before")
        selection = self.select(defender, settings, self.folder.shared, self.stages)
        if self.select is not select_feature_maps:
            selection = check_selection(selection, defender.layers, self.select)
        own = self.stages.cpu_seconds()
        self.stages.cpu_elsewhere = distributed.total(own) - own
        if not distributed.is_leader():  # one process goes on from here
            return {"model": defender.model.network, "metrics": {}}
        fine_tuning = FineTuning.prepare(defender, selection, settings, self.device, self.folder.checkpoints)
        prune_feature_maps(defender.layers, selection.by_layer(defender.layers))
        LOGGER.info("pruned %d of %d feature maps; %d tied at a cut", selection.pruned, len(selection.mask), selection.ties)
        history = self.fine_tune(fine_tuning, selection)
        metrics = self.write(selection, history)
        defender.model.eval().zero_grad(set_to_none=True)
        if not settings.epochs and not fine_tuning.state.exists():  # with one, they are of an interrupted run
            self.folder.remove_epochs()
        fine_tuning.forget()
        return {"model": defender.model.network, "metrics": metrics}

    def fine_tune(self, fine_tuning: FineTuning, selection: Selection) -> History:
        """Train the pruned model on the clean subset, test it now and then; the last epoch is always tested."""
        if not self.settings.epochs:
            return [(None, self.evaluate("pruned") if selection.pruned else self.evaluations[0].metrics)]
        epochs, left = [], "earlier results are unchanged"
        left += ", but for their saved epochs" if self.folder.saved_epochs() else ""
        with self.stages("fine-tuning"), if_it_ends_early(left):
            for epoch in fine_tuning.run():
                if epoch.restored:
                    self.stages.reuse("fine-tuning")
                elif epoch.number == 1:
                    self.folder.remove_epochs()  # of an earlier run
                if epoch.to_test and epoch.metrics is None:
                    epoch.metrics = self.evaluate(f"epoch {epoch.number} of {self.settings.epochs}")
                if epoch.to_save:
                    self.folder.save_epoch(epoch.number - 1, self.inputs)
                epochs.append(epoch)
        if len(self.evaluations) < 2:  # all epochs were restored: their metrics are known, the single predictions are not
            self.evaluate("after fine-tuning")
        return [(epoch.epoch, epoch.metrics) for epoch in epochs]

    def evaluate(self, when: str) -> Metrics:
        """Test the model as it is, on both test sets."""
        test = self.inputs.test
        with self.stages("testing"), Progress("Testing", len(test), "images", LOGGER) as bar:
            evaluation = evaluate(self.inputs.defender.model, test, self.settings.batch_size, bar.add)
        self.evaluations = [*self.evaluations[:1], evaluation]
        LOGGER.info("%s: %s", when, in_percent(evaluation.metrics.headline()))
        return evaluation.metrics

    def write(self, selection: Selection, history: History) -> dict[str, Any]:
        """Write all results; returns the content of metrics.json."""
        with if_it_ends_early("new results are partly written"):
            summary = self.folder.write(self.inputs, selection, history, self.evaluations, self.device, self.stages)
            LOGGER.info("results are in %s", self.folder.path)
            if self.settings.report:
                LOGGER.info("report: %s", write_report(self.inputs.record, self.folder.path, self.inputs.test))
        return summary.as_dict()

    def defense(self, result_file: str) -> dict[str, Any]:
        if not RUNNING.acquire(blocking=False):
            raise UserError("Another thread runs FMP, and all threads share their random numbers; start another process.")
        try:
            self.set_result(result_file)
            self.folder.check()
            with locked(self.folder.path, self.settings.wait) if distributed.is_leader() else nullcontext():
                self.set_logger()
                return self.mitigation()
        finally:
            logs.close()
            RUNNING.release()
