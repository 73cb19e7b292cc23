"""The last test of a defense of BackdoorBench that tested on few images while it ran: on all of them, as ours are tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fmp_core.backdoorbench.workspace import Job
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import open_split
from fmp_core.data.names import DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.inputs import preprocessing, read_test_data
from fmp_core.models.build import PixelModel, load_model
from fmp_core.models.evaluate import evaluate
from fmp_core.results.read import MODEL_DIGEST, WHOLE_TEST
from fmp_core.settings import Settings
from fmp_core.storage.files import file_digest, write_json
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system.devices import choose_device


def masks_applied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with a weight where ``torch.nn.utils.prune``, which fp uses, keeps ``<weight>_orig`` and ``<weight>_mask``."""
    masks = {key.removesuffix("_mask"): mask for key, mask in state.items() if f"{key.removesuffix('_mask')}_orig" in state}
    plain = {key.removesuffix("_orig"): value for key, value in state.items() if key.removesuffix("_mask") not in masks}
    return {key: value * masks[key] if key in masks else value for key, value in plain.items()}


def write_final_test(job: Job, results: Path) -> None:
    """Test the model in ``defense_result.pt`` of the folder ``results``, and write the figures beside it.

    Raises UserError: the file does not hold weights of the record's model, or the record is another one than at the start.
    """
    device = choose_device(job.device).device
    record = read_attack_record(job.folder)
    if record.digest != job.digest:
        raise UserError(f"{job.folder} was made again while the defense ran; run the defense again.")
    test = read_test_data(record, open_split(job.dataset_path, record.dataset, False, record.image_size), device)
    content = load_torch_file(results / DEFENSE_FILE)
    try:
        network = load_model(job.model_name, job.num_classes, masks_applied(content["model"]))
    except (KeyError, TypeError):
        raise UserError(f"{results / DEFENSE_FILE} holds no model; run the defense without --test_images.") from None
    model = PixelModel(network, preprocessing(record)).on(device)
    metrics = evaluate(model, test, Settings().batch_size).metrics
    tested = {**asdict(metrics), MODEL_DIGEST: file_digest(results / DEFENSE_FILE)}
    write_json(results / WHOLE_TEST, tested)
