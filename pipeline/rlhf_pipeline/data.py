"""Turns a table into the train and held-out rows of a stage: texts, pairs, prompts or labelled texts."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError
from rlhf_api.run import Data, LabelledData, PromptData, SFTData
from rlhf_pipeline.preferences import preference_rows, text_columns
from rlhf_pipeline.rows import Made, Rows, checked, kept_rows, one_class, some, take, without_blanks
from rlhf_pipeline.splits import hold_out, in_range, without_duplicates
from rlhf_pipeline.stage_process import Stage
from rlhf_pipeline.tables import check_column, equals, read_table
from rlhf_pipeline.tokens import TOKENIZER_FILES, Encoder


def import_table(stage: Stage) -> dict[str, float]:
    """Write train.parquet, heldout.parquet and report.json of the one table that the settings name.

    Returns the numbers of rows. The same settings and source give the same bytes.
    """
    settings = stage.settings
    stage.progress.update(phase="reading the table")
    encoder = Encoder(stage.input("model", include=list(TOKENIZER_FILES)))
    source = stage.work / "source"

    def read(data: Data, where: str, texts: Sequence[str]) -> Any:
        return read_table(data, where, texts, source, stage.config.store)

    schema = {"text": pa.string()}
    data: Data
    if sft := settings.sft_data:
        data, made = sft, sft_rows(read(sft, "data.sft", [sft.text_column]), sft)
    elif pairs := settings.preference_data:
        data, made = pairs, preference_rows(read(pairs, "data.preferences", text_columns(pairs)), pairs, settings.seed)
        schema = dict.fromkeys(("prompt", "chosen", "rejected"), pa.string())
    elif prompts := settings.prompt_data:
        assert settings.prompt_tokens
        table = read(prompts, "data.prompts", [prompts.prompt_column])
        data, made = prompts, prompt_rows(table, prompts, encoder, settings.prompt_tokens)
        schema = {"prompt": pa.string(), "input_ids": pa.list_(pa.int32())}
    else:
        labelled = settings.evaluation_data
        assert labelled
        data, made = labelled, labelled_rows(read(labelled, "data.evaluation", [labelled.text_column]), labelled)
        schema = {"text": pa.string(), "label": pa.bool_()}

    stage.progress.update(phase="writing rows")
    rows = {}
    for name, part in (("train", made.train), ("heldout", made.held_out)):
        table = pa.table({column: pa.array(part[column], kind) for column, kind in schema.items()})
        pq.write_table(table, stage.output / f"{name}.parquet", compression="zstd")
        rows[f"{name}_rows"] = table.num_rows
    report = {"source": data.source, **rows, **made.figures, "tokens": _token_figures(made.measured, encoder)}
    (stage.output / "report.json").write_bytes(canonical_json(report))
    shutil.rmtree(source, ignore_errors=True)
    return {name: float(count) for name, count in rows.items()}


def sft_rows(table: Any, data: SFTData) -> Made:
    """Texts. Raises UserError if none is left."""
    columns = {"text": table.column(data.text_column).to_pylist()}
    figures, columns = without_blanks(columns, "data.sft")
    kept = kept_rows(columns["text"], columns["text"], data, figures, "data.sft")
    split = checked(hold_out(columns["text"], kept, data.held_out), "data.sft", data)
    return Made(take(columns, split.train), take(columns, split.held_out), some(columns["text"], split.train), figures)


def labelled_rows(table: Any, data: LabelledData) -> Made:
    """Texts with whether their label is the chosen one. Raises UserError unless both classes are there to train on."""
    where = "data.evaluation"
    check_column(table, data.label_column, where)
    good = equals(table.column(data.label_column), data.chosen_label, f"{where}.chosenLabel")
    columns = {"text": table.column(data.text_column).to_pylist(), "label": good.to_pylist()}
    figures, columns = without_blanks(columns, where, texts=["text"])
    kept = kept_rows(columns["text"], columns["text"], data, figures, where)
    split = checked(hold_out(columns["text"], kept, data.held_out), where, data)
    train = take(columns, split.train)
    if len(set(train["label"])) < 2:
        one_class(table, data.label_column, data.chosen_label, where)
    figures["chosen_rows"] = sum(train["label"])
    return Made(train, take(columns, split.held_out), some(columns["text"], split.train), figures)


def prompt_rows(table: Any, data: PromptData, encoder: Encoder, limit: int) -> Made:
    """Prompts with their token ids, at most `limit` of them. Raises UserError if one is longer and overflow is error.

    A prompt that is cut is what remains of it: duplicates and held-out rows are decided by the remainder.
    """
    where = "data.prompts"
    columns = {"prompt": table.column(data.prompt_column).to_pylist()}
    figures, columns = without_blanks(columns, where)
    chosen = in_range(columns["prompt"], data.rows)
    figures["outside_range"] = len(columns["prompt"]) - len(chosen)
    texts = [columns["prompt"][index] for index in chosen]
    ids = [_without_eos(row, encoder.eos) for row in encoder.encode(texts)]
    too_long = [index for index, row in enumerate(ids) if len(row) > limit]
    figures["too_long"] = len(too_long)
    if too_long and data.overflow == "error":
        longest = max(len(ids[index]) for index in too_long)
        raise UserError(
            f"{where}: {len(too_long)} of {len(ids)} prompts are longer than ppo.promptTokens {limit}, the longest has "
            f"{longest} tokens; raise ppo.promptTokens to {longest}, or set data.prompts.overflow to truncate or drop"
        )
    if data.overflow == "drop":
        dropped = set(too_long)
        texts = [text for index, text in enumerate(texts) if index not in dropped]
        ids = [row for index, row in enumerate(ids) if index not in dropped]
    elif too_long:
        ids = [row[:limit] for row in ids]
        for index, text in zip(too_long, encoder.decode([ids[index] for index in too_long]), strict=True):
            texts[index] = text
    filled = [index for index, row in enumerate(ids) if row]
    keys = [" ".join(map(str, row)) for row in ids]
    kept = without_duplicates(keys, filled)
    figures["duplicates"] = len(filled) - len(kept)
    kept = kept[: data.limit]
    split = checked(hold_out(keys, kept, data.held_out), where, data)
    rows: Rows = {"prompt": texts, "input_ids": ids}
    return Made(take(rows, split.train), take(rows, split.held_out), some(ids, split.train), figures)


def _without_eos(row: list[int], eos: int) -> list[int]:
    """A prompt that ends with EOS, as some tokenizers make it, has nothing to be continued."""
    return row[:-1] if row and row[-1] == eos else row


def _token_figures(rows: Sequence[Any], encoder: Encoder) -> dict[str, int]:
    """Lengths in tokens, with special tokens, of the first rows of the training part."""
    ids = encoder.encode(rows) if rows and isinstance(rows[0], str) else rows
    lengths = sorted(len(row) for row in ids)
    at: Callable[[float], int] = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
    return {"rows": len(lengths), "min": lengths[0], "median": at(0.5), "p95": at(0.95), "max": lengths[-1]}
