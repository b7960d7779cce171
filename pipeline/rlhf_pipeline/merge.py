"""Merges the SFT adapter into the base's 16-bit weights, shard by shard and tensor by tensor.

Each weight file of the base comes from the store when its first tensor is needed, and each merged one goes there as
soon as it is whole. Memory: the largest adapted weight three times in float32, and 16 MiB, whatever the model's size;
then, to measure the drift, that of the quantised model. Disk: one file of the base and two of the merged model; with
the drift all of them, since the quantised models are loaded from there.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_api.quantity import bytes_of
from rlhf_api.run import Merge
from rlhf_pipeline.lora_update import LoraUpdate, read_adapter
from rlhf_pipeline.sources import INDEX, Files, RangedFiles, side_files, weight_files
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.stored_weights import InputFiles, Shipping
from rlhf_pipeline.tensor_files import (
    ShardWriter,
    TensorEntry,
    TensorPlan,
    index_of,
    parse_header,
    plan_shards,
    read_blocks,
    read_tensor,
)


def run(stage: Stage) -> dict[str, float]:
    """Write the merged model and its report. Returns the drift and the number of merged weights."""
    settings = stage.settings
    merge = settings.merge
    assert merge
    stage.progress.update(phase="merging")
    rows = _drift_rows(stage)
    adapter = stage.input("adapter", include=["adapter/*"]) / "adapter"
    base = InputFiles(stage, "model", keep=bool(rows))
    with Shipping(stage, keep=bool(rows)) as shipping:
        plan, shards = write_merged(
            base,
            adapter,
            stage.output,
            merge,
            progress=lambda done, total: stage.progress.update(step=done, total=total),
            ship=shipping.send,
        )
    report: dict[str, Any] = {
        "merged_weights": len(plan.updates),
        "tensors": len(plan.tensors),
        "bytes": sum(tensor.bytes for tensor in plan.tensors.values()),
        "dtype": merge.dtype,
        "shards": shards,
    }
    metrics = {"merged_weights": float(len(plan.updates))}
    if rows:
        stage.progress.update(phase="measuring drift")
        drift = _drift(stage, adapter, rows)
        report["drift"] = drift
        metrics |= {"drift": drift["difference"], "merged_loss": drift["merged_loss"]}
    (stage.output / "report.json").write_bytes(canonical_json(report))
    return metrics


def write_merged(
    base: RangedFiles,
    adapter: Path,
    target: Path,
    merge: Merge,
    progress: Callable[[int, int], None],
    ship: Callable[[Path], None],
) -> tuple["MergePlan", list[str]]:
    """Write the merged model as a Hugging Face folder. Returns what was merged and the names of the weight files.

    progress: called with the number of tensors written and of all; ship: with each weight file that is whole.
    Raises UserError if base and adapter do not fit each other.
    """
    copy_side_files(base, target, merge.dtype)
    plan = plan_merge(base, target, read_adapter(adapter), getattr(torch, merge.dtype))
    shards = plan_shards(plan.tensors, bytes_of(merge.shard_size))
    done = 0
    for name, tensors in shards.items():
        with ShardWriter(target / name, tensors, plan.tensors) as writer:
            for tensor in writer.order:
                writer.write(tensor, plan.pieces(tensor))
                done += 1
                progress(done, len(plan.tensors))
        ship(target / name)
    if len(shards) > 1:
        (target / INDEX).write_bytes(index_of(shards, plan.tensors))
    return plan, list(shards)


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, and what it is made of."""

    base: RangedFiles
    folder: Path  # of the merged model; files of the base that have to be fetched go there
    tensors: dict[str, TensorPlan]
    sources: dict[str, TensorEntry]
    updates: dict[str, LoraUpdate]  # by tensor
    transposed: frozenset[str]  # tensors stored as (in, out)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor in its final type, as pieces that follow each other. Raises UserError if a value does not fit."""
        dtype, source = self.tensors[name].dtype, self.sources[name]
        source = replace(source, file=self.base.fetch(source.file.name, self.folder))
        if name in self.updates:
            merged = self.updates[name].merge(read_tensor(source), name in self.transposed)
            yield _rounded(merged, dtype, name)
        else:
            for block in read_blocks(source):
                yield _rounded(block, dtype, name)


def plan_merge(base: RangedFiles, folder: Path, adapter: Mapping[str, LoraUpdate], dtype: torch.dtype) -> MergePlan:
    """What to write, found from headers and from the config in `folder` alone.

    Raises UserError if an update fits no weight of the base.
    """
    sources: dict[str, TensorEntry] = {}
    for file in weight_files("base", base, folder):
        sources |= parse_header(Path(file), base.sizes[file], partial(base.read, file))
    skeleton = _skeleton(folder)
    modules = dict(skeleton.named_modules())
    updates: dict[str, LoraUpdate] = {}
    transposed: set[str] = set()
    config = skeleton.config.get_text_config()
    tied = {skeleton.get_input_embeddings(), skeleton.get_output_embeddings()} if config.tie_word_embeddings else set()
    for path, update in adapter.items():
        if path not in modules:
            raise UserError(f"adapter: the base has no module {path}; the adapter was trained on another model")
        if modules[path] in tied:
            raise UserError(
                f"adapter: {path} shares its weight with another layer, and a merge would change both; "
                "leave it out of lora.targetModules"
            )
        name = _tensor_name(path, skeleton.base_model_prefix, sources)
        if type(modules[path]).__name__ == "Conv1D":
            transposed.add(name)
        shape = update.shape[::-1] if name in transposed else update.shape
        if sources[name].shape != shape:
            raise UserError(f"adapter: {path} is made for a weight of {shape}; the base's is {sources[name].shape}")
        updates[name] = update
    tensors = {
        name: TensorPlan(entry.shape, dtype if entry.dtype.is_floating_point else entry.dtype)
        for name, entry in sources.items()
    }
    return MergePlan(base, folder, tensors, sources, updates, frozenset(transposed))


def _skeleton(folder: Path) -> Any:
    """The model without weights: it knows its modules' names and kinds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def _tensor_name(path: str, prefix: str, sources: Mapping[str, TensorEntry]) -> str:
    """The weight of a module as the files name it: some leave out the prefix of the model without its head."""
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        if (weight := f"{name}.weight") in sources:
            return weight
    raise UserError(f"adapter: no weight file of the base holds {path}.weight, which the adapter updates")


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not values.is_floating_point():
        return values
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        if torch.isfinite(values).all():
            raise UserError(f"merge.dtype: {name} has values that {dtype} cannot hold; use bfloat16")
        raise UserError(f"merge: {name} has values that are not finite; the base or the adapter is broken")
    return rounded


def copy_side_files(base: Files, target: Path, dtype: str) -> None:
    """Copy config, tokenizer and generation files, with the config saying the new type of the weights."""
    for name in side_files(base):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.fetch(name, target), target / name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of dtype
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _drift_rows(stage: Stage) -> list[list[int]]:
    """Token ids of held-out texts to measure the drift on; none if no text was held out."""
    from rlhf_pipeline.drift import ROWS, few_rows
    from rlhf_pipeline.models import load_tokenizer
    from rlhf_pipeline.training import encode, read_columns

    assert stage.settings.sft
    texts = read_columns(stage.input("data") / "heldout.parquet", ["text"], slice(ROWS))["text"]
    if not texts:
        return []
    tokenizer = load_tokenizer(stage.input("model", ["*.json", "*.jinja", "*.model", "*.txt"]))
    return few_rows(encode(tokenizer, texts, stage.settings.sft.sequence_length))


def _drift(stage: Stage, adapter: Path, rows: list[list[int]]) -> dict[str, float]:
    from rlhf_pipeline.drift import measure_drift
    from rlhf_pipeline.models import device_of

    assert stage.settings.quantization
    device = device_of(stage.config.gpu)
    return measure_drift(stage.input("model"), adapter, stage.output, rows, stage.settings.quantization, device)
