# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint opened to be converted: its linears and caches by saver or adapter, its model on meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.errors import ModelError, nearest
from modelslim.kv_cache import find_places
from modelslim.loader import Loader
from modelslim.model_info import ModelInfo, describe
from modelslim.registry import Registry
from modelslim.saved import find_saver
from modelslim.saved_config import named_as_float, opened_as_float
from modelslim.saver import SavedCache, SavedLinear, Saver
from modelslim.session import Session
from modelslim.types import CacheInfo, LinearInfo


@dataclass(frozen=True)
class Piece:
    """What is converted in one go.

    Attributes:
        name: the stored name of a linear, or of the linear that fills a cache; else the name of a tensor.
        saved: the linear or the cache; None for a tensor that is copied.
    """

    name: str
    saved: SavedLinear | SavedCache | None


@dataclass(frozen=True)
class Source:
    """The checkpoint, and the model that it is of.

    Attributes:
        checkpoint: its tensors; those that the adapter decodes are float.
        format: name of the saver that writes such checkpoints; empty when the adapter decodes it.
        saver: writes as the one that wrote it.
        saved: quantized linears by stored name.
        caches: quantized key/value caches, by the stored name of the linear that fills each.
        places: where these caches are, by the same names.
        session: the adapter and what observes the conversion.
        model: the model on meta.
        info: its structure.
        loader: knows stored names; cannot read the quantized ones.
        linears: the model's linears by stored name.
    """

    checkpoint: Checkpoint
    format: str
    saver: Saver | None
    saved: Mapping[str, SavedLinear]
    caches: Mapping[str, SavedCache]
    places: Mapping[str, CacheInfo]
    session: Session
    model: nn.Module
    info: ModelInfo
    loader: Loader
    linears: Mapping[str, LinearInfo]

    @property
    def copied(self) -> list[str]:
        """Names of the tensors that no quantized linear and no cache holds."""
        return [piece.name for pieces in self.pieces().values() for piece in pieces if piece.saved is None]

    def pieces(self) -> dict[Path, list[Piece]]:
        """All of it in the order in which it lies on the disk, by weight file."""
        every: list[tuple[str, SavedLinear | SavedCache]] = [*self.saved.items(), *self.caches.items()]
        owner = {tensor: Piece(name, saved) for name, saved in every for tensor in saved.tensors}
        found: dict[Path, list[Piece]] = {}
        done: set[str] = set()
        for name, stored in self.checkpoint.tensors.items():
            if name not in done:
                piece = owner.get(name, Piece(name, None))
                done.update(piece.saved.tensors if piece.saved else ())
                found.setdefault(stored.file, []).append(piece)
        return found


def open_source(
    path: Path, registry: Registry, trust_remote_code: bool, observers: Sequence[tuple[str, object]] = ()
) -> Source:
    """Open a checkpoint without reading a weight.

    Raises:
        ModelError: it is damaged, or nothing installed reads it.
        PluginError: no adapter serves its model.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    kind, name, _ = choose_adapter(config, None, registry)
    unknown = ""
    try:
        format_, saver_kind = find_saver(path, registry)
        saver: Saver | None = saver_kind.of_checkpoint(path)
    except ModelError as error:  # perhaps one that the adapter decodes
        format_, saver, unknown = "", None, error.hint
    with opened_as_float(checkpoint) if saver else nullcontext(path) as directory:
        session = open_session(kind, name, config["model_type"], directory, trust_remote_code, registry, observers)
        own = checkpoint
        saved: Mapping[str, SavedLinear] = {}
        caches: Mapping[str, SavedCache] = {}
        if saver:
            saved, caches = saver.read_layout(path, checkpoint.shapes), saver.read_caches(path, checkpoint.shapes)
            own = Checkpoint(path, named_as_float(checkpoint.tensors, saved))
        else:
            decoded = session.get_decoded_tensors(checkpoint.stored)
            if not decoded:
                described = config.get("quantization_config")
                method = described.get("quant_method") if isinstance(described, dict) else None
                raise ModelError(
                    f"{path} is no quantized checkpoint that something installed reads"
                    + (f" (config.json: quant_method {method})" if method else ""),
                    hint=f"a float model is quantized by `modelslim quant`; {unknown}",
                )
            checkpoint.decode(decoded)
        model = session.init_model("meta")
        loader = Loader(model, own, session.get_weight_sources(model, own.shapes), "cpu")
        info = describe(model, list(session.generate_model_visit(model)), loader)
        places = {one.stored: one for one in find_places(session.get_kv_caches(model), info)} if caches else {}
    linears = {linear.stored: linear for linear in info.linears.values()}
    for stored in (*saved, *caches):
        if stored not in (linears if stored in saved else places):
            what = "is quantized and is no linear of the model" if stored in saved else "fills no cache of the model"
            raise ModelError(f"{stored} {what}", hint=nearest(stored, linears))
    return Source(checkpoint, format_, saver, saved, caches, places, session, model, info, loader, linears)
