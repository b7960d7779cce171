"""Brings the model of a run into the store, checked, so that later stages need no internet."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from rlhf_api.budget import shape_of
from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_api.run import Model
from rlhf_pipeline.model_folder import model_facts, save_tokenizer, set_pad_id, vocabulary_of
from rlhf_pipeline.sources import INDEX, Files, LocalFiles, fetch_file, open_files, side_files, weight_files
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.tensor_files import read_header


def import_model(stage: Stage) -> dict[str, float]:
    """Write the model as a Hugging Face folder with PAD ≠ EOS, and its report. Returns parameters and bytes.

    Weight files pass one by one: each is checked, sent to the store and let go before the next is read.
    """
    model = stage.settings.model
    assert model
    stage.progress.update(phase="reading the model")
    weights = Weights()
    if model.source.endswith(".gguf"):
        tokenizer, version = _from_gguf(stage, model), None
        names = sorted(path.name for path in stage.output.glob("*.safetensors"))
        for name in names:
            weights.add(stage.output / name)
            stage.writer.add_file(name, stage.output / name, settled=True)
    else:
        from transformers import AutoTokenizer

        files = open_files(model.source, model.revision, stage.config.store)
        version = files.version
        names = weight_files(model.source, files, stage.work / "source")
        _copy_side_files(model, files, stage)
        model_facts(stage.output)  # a fault of the config shows before the weights are copied
        tokenizer = _readable(model, lambda: AutoTokenizer.from_pretrained(stage.output))
        for number, name in enumerate(names):
            stage.progress.update(step=number, total=len(names), phase="copying weights")
            path = files.fetch(name, stage.work / "source")
            weights.add(path)
            fetched = not isinstance(files, LocalFiles)
            stage.writer.add_file(name, path, settled=fetched)
            if fetched:
                path.unlink()

    stage.progress.update(step=len(names), total=len(names), phase="checking")
    facts = save_tokenizer(tokenizer, model.pad_token, vocabulary_of(stage.output), stage.output)
    set_pad_id(stage.output, facts["pad_token_id"])
    report = {
        "source": model.source,
        "revision": version,
        "model": model_facts(stage.output),
        "parameters": weights.parameters,
        "bytes": weights.bytes,
        "dtypes": weights.dtypes,
        "files": weights.files,
        "tokenizer": facts,
    }
    (stage.output / "report.json").write_bytes(canonical_json(report))
    # The shape travels with the figures: the plan checks settings against it before anything trains.
    shape = shape_of(json.loads((stage.output / "config.json").read_bytes()))
    return {"parameters": float(weights.parameters), "bytes": float(weights.bytes)} | (shape.figures() if shape else {})


class Weights:
    """What the weight files hold, added up as they pass."""

    def __init__(self) -> None:
        self.parameters = self.bytes = 0
        self.dtypes: dict[str, int] = {}
        self.files: dict[str, int] = {}

    def add(self, file: Path) -> None:
        """Read one file's header. Raises UserError if the file is truncated or quantised."""
        for entry in read_header(file).values():
            name = str(entry.dtype).removeprefix("torch.")
            self.dtypes[name] = self.dtypes.get(name, 0) + prod(entry.shape)
            self.parameters += prod(entry.shape)
            self.bytes += entry.end - entry.start
        self.files[file.name] = file.stat().st_size


def _from_gguf(stage: Stage, model: Model) -> Any:
    from rlhf_pipeline.gguf_model import convert_gguf

    file = fetch_file(model.source, model.revision, stage.work / "source", stage.config.store)
    stage.progress.update(phase="dequantising")
    return convert_gguf(file, stage.output)


def _copy_side_files(model: Model, files: Files, stage: Stage) -> None:
    names = side_files(files)
    if "config.json" not in names:
        raise UserError(f"model.source: {model.source} has no config.json; it is not a Hugging Face model folder")
    for name in [*names, *([INDEX] if INDEX in files.sizes else [])]:
        target = stage.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files.fetch(name, stage.work / "source"), target)


def _readable(model: Model, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model.source: {model.source} has no tokenizer that transformers can read: {error}") from error
