"""TODO: rotdistill_core.checkpoint.open."""

from __future__ import annotations

from pathlib import Path

from rotdistill_core.checkpoint.headers import folder_headers, read_config
from rotdistill_core.checkpoint.models import Log, Model, Pair
from rotdistill_core.errors import SetupError
from rotdistill_core.plugin.registry import SOURCES, adapter_for, installed_plugins, locate_source
from rotdistill_core.recipe.document import ModelRef


def open_model(ref: ModelRef, log: Log = lambda _: None) -> Model:
    """Find a model and check it against its adapter, from config and headers alone.

    Raises:
        SetupError: not found, torn, or not covered by an adapter.
    """
    folder = locate_model(ref, log)
    config = read_config(folder)
    adapter = adapter_for(str(config.get("model_type", "")))
    config = adapter.completed(config)
    adapter.check(config, {n: h.shape for n, h in folder_headers(folder).items()}, str(folder))
    return Model(ref, folder, config, adapter)


def open_pair(
    teacher: ModelRef, student: ModelRef, anchor: ModelRef | None, log: Log = lambda _: None
) -> Pair:
    """Open the models of a recipe.

    Raises:
        SetupError: see `open_model`; or the anchor has another shape than the student.
    """
    pair = Pair(
        open_model(teacher, log),
        open_model(student, log),
        open_model(anchor, log) if anchor else None,
    )
    if pair.anchor:
        views = (pair.student, pair.anchor)
        mine, its = (
            {
                "layers": m.depth,
                "heads": tuple(m.adapter.heads(m.config)),
                **m.adapter.sizes(m.config),
            }
            for m in views
        )
        if differ := [what for what in {**mine, **its} if mine.get(what) != its.get(what)]:
            shown = f"{differ[0]}: {its.get(differ[0])}, and {mine.get(differ[0])} in the student"
            raise SetupError(
                f"{pair.anchor.ref.model}: an anchor is a checkpoint of the student's shape; this one differs in {shown}."
            )
    return pair


def locate_model(ref: ModelRef, log: Log = lambda _: None) -> Path:
    """Return the local folder behind a reference, made or downloaded when it was not there.

    Raises:
        SetupError: there is no such model, or it cannot be had.
        PluginError: the reference is of a kind that an uninstalled plugin opens.
    """
    name = ref.model
    scheme, colon, _ = name.partition(":")
    kind = f"{scheme}:" if colon and scheme.isidentifier() else Path(name).suffix
    if kind in (".gguf", "package:") or kind in installed_plugins(SOURCES):
        return locate_source(kind, name, log)
    if (path := Path(name).expanduser()).is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SetupError(f"{name}: is neither a folder here nor a Hugging Face id (owner/name).")
    return locate_source("hub:", f"hub:{name}@{ref.revision or ''}", log)
