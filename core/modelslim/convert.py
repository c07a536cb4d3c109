# SPDX-License-Identifier: Apache-2.0
"""From one format of quantized checkpoints into another without calibration: exactly, or not at all."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.convert_plan import Conversion, decode, plan_conversion
from modelslim.convert_source import Piece
from modelslim.disk import write_json
from modelslim.errors import Diagnostic, VerificationError
from modelslim.exactness import round_scales
from modelslim.files import copy_companions
from modelslim.kv_cache import QuantizedCache
from modelslim.loader import Loader
from modelslim.output_directory import OutputDirectory, check_save_path, check_space
from modelslim.report import REPORT, peak_memory
from modelslim.saver import TensorRecord
from modelslim.types import QuantSpec, TensorSpec
from modelslim.verify import verify
from modelslim.writer import ShardWriter

_ENTRY_BYTES = 112  # of a header entry, without the name


def convert(
    path: Path,
    save_path: Path,
    to: str,
    *,
    part_file_size: float | None = None,
    engine: str | None = None,
    tp: int = 1,
    round_scales: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    observers: Sequence[tuple[str, object]] = (),
) -> dict[str, Any]:
    """Convert a quantized checkpoint into another format.

    Codes and scales stay what they are to the bit; a conversion that would round something is refused before
    anything is written. To ``float`` they are multiplied, and the product is rounded once to the model's dtype.

    Args:
        path: the checkpoint: of a format that an installed saver writes, or one that the model's adapter decodes.
        save_path: where the result goes; must not exist, or be empty.
        to: name of the saver that writes the result, or ``float``.
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file; None for the saver's
            default.
        engine: refuse what this engine does not load; see ``make_plan``.
        tp: the engine's degree of tensor parallelism.
        round_scales: round scales to the type in which the engine of the result holds them, instead of refusing;
            codes stay, so a weight changes as its scale does.
        trust_remote_code: allow code of the checkpoint to run.
        check: verify the result before it gets its name.
        observers: further plugins of this run, by name.

    Returns:
        The report, which also lies in ``<save_path>/report.json``.

    Raises:
        CapabilityError: it cannot be done exactly; says what would be lost.
        VerificationError: the result is faulty; it keeps the name ``<save_path>.partial``.
        ModelSlimError: another of its subclasses; nothing lies under ``save_path`` then.
    """
    check_save_path(save_path, path)
    conversion = plan_conversion(
        path,
        to,
        part_file_size=part_file_size,
        engine=engine,
        tp=tp,
        round_scales=round_scales,
        trust_remote_code=trust_remote_code,
        observers=observers,
    )
    checkpoint, session = conversion.source.checkpoint, conversion.source.session
    check_space(save_path, sum(conversion.sizes.values()))
    header = {"journal": 1, "conversion": [str(path), to]}
    with checkpoint, OutputDirectory(save_path, header) as output:
        records = _write(conversion, output)
        _write_files(conversion, output.path, records)
        report = _report(conversion, save_path, records)
        write_json(output.path / REPORT, report)
        if check:
            faults = _faults(conversion, output.path, engine, tp, trust_remote_code)
            if faults:
                output.keep()
                raise VerificationError(
                    f"{output.path}: the result is faulty and keeps this name",
                    diagnostics=faults,
                    hint="check the source with `modelslim verify`; --no-verify skips this check",
                )
        output.commit()
    session.run_finished(report)
    return report


def _write(conversion: Conversion, output: OutputDirectory) -> list[TensorRecord]:
    """Write all tensors, each linear read, decoded, encoded and forgotten."""
    source, saver = conversion.source, conversion.saver
    checkpoint, session = source.checkpoint, source.session
    shards = ShardWriter(
        output.path,
        saver.weights_name(conversion.planned),
        saver.max_shard_bytes,
        sum(len(name.encode()) + _ENTRY_BYTES for name in conversion.sizes),
        session.tensor_written,
    )
    records: list[TensorRecord] = []
    pieces = source.pieces()
    try:
        for number, (file, held) in enumerate(pieces.items()):
            start, total = time.monotonic(), 2 * len(pieces)
            session.unit_started(file.name, len(pieces) + number, total)
            for piece in held:
                if piece.saved is None:
                    stored = checkpoint.tensors[piece.name]
                    shards.add(piece.name, stored.dtype, stored.shape, stored.nbytes, checkpoint.chunks(piece.name))
                    records.append(TensorRecord(piece.name, None, stored.nbytes))
                    continue
                for name, tensor, spec, cache in _encoded(conversion, piece):
                    records.append(shards.add_tensor(name, tensor, spec, cache).record)
            linears = {piece.name: conversion.format for piece in held if piece.name in source.saved}
            record = {"linears": linears, "seconds": {"convert": time.monotonic() - start}}
            session.unit_finished(file.name, len(pieces) + number, total, record)
            output.journal({"file": file.name, **shards.progress})
        shards.finish()
    finally:
        shards.abandon()
    return records


def _encoded(conversion: Conversion, piece: Piece) -> Iterator[tuple[str, Tensor, QuantSpec | None, TensorSpec | None]]:
    """The tensors that a piece becomes, each with the scheme of its linear or cache."""
    source, saver, dtype = conversion.source, conversion.saver, conversion.planned.dtype
    assert piece.saved is not None
    module = decode(piece, {name: source.checkpoint.read(name) for name in piece.saved.tensors})
    if isinstance(module, QuantizedCache):
        if not conversion.to_float:
            for name, tensor in saver.encode_cache(source.places[piece.name], module, dtype):
                yield name, tensor, None, module.spec
        return
    if conversion.round_scales:
        round_scales(saver, module, dtype)
    for name, tensor in saver.encode(piece.name, module, dtype):
        yield name, tensor, None if conversion.to_float else module.spec, None


def _write_files(conversion: Conversion, path: Path, records: Sequence[TensorRecord]) -> None:
    """Write what lies beside the weights."""
    checkpoint, saver = conversion.source.checkpoint, conversion.saver
    for name, value in saver.finish(records, conversion.planned).items():
        write_json(path / name, value)
    copy_companions(checkpoint.path, path)
    write_json(path / "config.json", saver.edit_config(dict(checkpoint.config), records, conversion.planned))


def _report(conversion: Conversion, save_path: Path, records: Sequence[TensorRecord]) -> dict[str, Any]:
    """What happened, as plain JSON values; with what the report of the source says of its tensors."""
    source = conversion.source
    decoded = len(source.checkpoint.stored) - len(source.checkpoint.tensors)
    kept = _told(source.checkpoint.path / REPORT)
    return {
        "report": 1,
        "model_path": str(source.checkpoint.path),
        "save_path": str(save_path),
        "from": source.format,
        "to": conversion.format,
        "schemes": dict(Counter(spec.scheme for spec in conversion.specs.values())),
        "decoded": decoded,
        "bytes_before": sum(stored.nbytes for stored in source.checkpoint.stored.values()),
        "bytes_after": sum(record.nbytes for record in records),
        "tensors": {"source": len(source.checkpoint.stored), "written": len(records), "copied": len(source.copied)},
        **kept,
        "peak_memory_bytes": peak_memory(),
        "warnings": list(conversion.warnings),
    }


def _told(report: Path) -> Mapping[str, Any]:
    """What `verify` wants to know of the run that quantized; empty when nobody wrote it down."""
    try:
        value = json.loads(report.read_text(encoding="utf-8"))
        return {key: list(value[key]) for key in ("rescaled", "left_out")}
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody else's file of that name
        return {}


def _faults(
    conversion: Conversion, path: Path, engine: str | None, tp: int, trust_remote_code: bool
) -> list[Diagnostic]:
    """What is wrong with the result."""
    if not conversion.to_float:
        found = verify(path, engine=engine, tp=tp, trust_remote_code=trust_remote_code)
        return [Diagnostic(problem.message, hint=problem.hint) for problem in found.faults]
    registry = conversion.registry
    with Checkpoint(path) as checkpoint:
        kind, name, _ = choose_adapter(checkpoint.config, None, registry)
        session = open_session(kind, name, checkpoint.config["model_type"], path, trust_remote_code, registry)
        model = session.init_model("meta")
        loader = Loader(model, checkpoint, session.get_weight_sources(model, checkpoint.shapes), "cpu")
        return [Diagnostic(problem) for problem in loader.check()]
