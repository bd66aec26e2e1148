"""Opening the models of a recipe: a reference becomes a local folder, checked against an adapter.

A reference is a folder, or of a kind that an installed source opens: an entry point in the group
`rotdistill.sources` whose name is the kind. A kind is an ending (`.x`), a scheme (`x:`), or
`owner/name`, the ids of a model hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rotdistill_core.architecture.counts import require_counts, require_depth
from rotdistill_core.checkpoint.file_hashes import FileHashes, remembered_hashes
from rotdistill_core.checkpoint.foreign import reading
from rotdistill_core.checkpoint.headers import (
    folder_headers,
    read_config,
    require_plain_files,
    settled_tie,
)
from rotdistill_core.checkpoint.models import Log, Model, Pair, check_tokenizer, end_tokens
from rotdistill_core.errors import PluginError, RotdistillError, SetupError
from rotdistill_core.plugin.registry import (
    SOURCES,
    adapter_for,
    adapter_origin,
    installed_plugins,
    locate_source,
)
from rotdistill_core.plugin.source_code import source_digest
from rotdistill_core.recipe.document import ModelRef
from rotdistill_core.store.layout import RunLayout

HUB_ID = "owner/name"
"""Kind of the ids of a model hub."""
_may_download: ContextVar[bool] = ContextVar("may_download", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Let sources give what is on this machine, and nothing else: for a plan or a check."""
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def may_download() -> bool:
    """Return whether a source may fetch a model now; where not, it raises `ModelNotAvailable`."""
    return _may_download.get()


def open_model(ref: ModelRef, log: Log = lambda _: None, hashes: FileHashes | None = None) -> Model:
    """Find a model and check it against its adapter, from config and headers alone.

    Args:
        ref: the recipe's reference.
        log: takes a line of text when a model has to be located.
        hashes: hashes its files; those in the user's cache are known if not given.

    Raises:
        SetupError: not found, torn, or different from what the adapter's table declares.
        PluginError: no installed source or adapter is for it.
    """
    return _opened(ref, locate_model(ref, log), hashes or remembered_hashes(log))


def open_checkpoint(folder: Path) -> Model:
    """Open a local folder, whatever its name looks like.

    Raises:
        SetupError, PluginError: see `open_model`.
    """
    return _opened(ModelRef(model=str(folder)), folder, remembered_hashes())


def _opened(ref: ModelRef, folder: Path, hashes: FileHashes) -> Model:
    require_plain_files(folder)
    config = read_config(folder)
    model_type = str(config.get("model_type", ""))
    adapter = adapter_for(model_type)
    headers = folder_headers(folder, adapter.body)
    path = folder / RunLayout.CONFIG
    with reading(path, "its config"):
        require_counts(adapter, config, str(folder))
        try:
            config = settled_tie(adapter.completed(config), adapter, headers)
            require_depth(adapter, config, headers, str(folder))
            shapes = {name: header.shape for name, header in headers.items()}
            adapter.check(config, shapes, str(folder))
        except (KeyError, TypeError) as error:
            sizes = (adapter.depth_key, adapter.width_key, adapter.query_key, adapter.neurons_key)
            lost = [key for key in (*sizes, "vocab_size") if config.get(key) is None]
            if not lost:
                raise
            raise SetupError(f"{path}: has no value for {' and '.join(lost)}.") from error
    check_tokenizer(folder)
    end_tokens(folder, config)
    return Model(
        ref=ref,
        folder=folder,
        config=config,
        adapter=adapter,
        table_code=source_digest(adapter_origin(model_type)),
        hashes=hashes,
    )


def open_pair(
    teacher: ModelRef, student: ModelRef, anchor: ModelRef | None, log: Log = lambda _: None
) -> Pair:
    """Open the models of a recipe.

    Raises:
        SetupError: see `open_model`; or the anchor has another shape than the student.
    """
    hashes = remembered_hashes(log)
    pair = Pair(
        teacher=open_model(teacher, log, hashes),
        student=open_model(student, log, hashes),
        anchor=open_model(anchor, log, hashes) if anchor else None,
    )
    if pair.anchor:
        _require_one_shape(pair.anchor, pair.student)
    return pair


def _require_one_shape(anchor: Model, student: Model) -> None:
    anchor_shape = _shape(anchor)
    student_shape = _shape(student)
    for size in {**student_shape, **anchor_shape}:
        if student_shape.get(size) != anchor_shape.get(size):
            raise SetupError(
                f"{anchor.ref.model}: an anchor is a checkpoint of the student's shape; this one "
                f"differs in {size}: {anchor_shape.get(size)}, and {student_shape.get(size)} in "
                "the student."
            )
    # transformers takes seconds to load, and few recipes have an anchor.
    from rotdistill_core.checkpoint.config_differences import (  # noqa: PLC0415
        config_differences,
        listed,
    )

    differences = config_differences(anchor.config, student.config, anchor.ref.model)
    if differences:
        raise SetupError(
            f"{anchor.ref.model}: its weights do not mean what they mean in the student: "
            f"{listed(differences, 'the student')}. An anchor is a fine-tune of the student's "
            "config; name another, or correct its config.json where that is wrong."
        )


def _shape(model: Model) -> dict[str, Any]:
    """Return every size of a model, by name."""
    heads = tuple(model.adapter.heads(model.config))
    return {"layers": model.depth, "heads": heads, **model.adapter.sizes(model.config)}


def locate_model(ref: ModelRef, log: Log = lambda _: None) -> Path:
    """Return the local folder that a reference names; a source may make or download it.

    Raises:
        ModelNotAvailable: it would have to be downloaded `without_downloads`.
        SetupError: there is no such model, or its source cannot get it.
        PluginError: no installed source opens references of this kind.
    """
    name = ref.model
    sources = installed_plugins(SOURCES)
    kind = _kind(name)
    if kind in sources:
        return locate_source(kind, name, log)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if _is_hub_id(name) and HUB_ID in sources:
        return locate_source(HUB_ID, f"{name}@{ref.revision}" if ref.revision else name, log)
    raise _not_found(name, sources)


def has_source(name: str) -> bool:
    """Return whether a source opens references of this kind, and no folder or hub is meant."""
    return _kind(name) in installed_plugins(SOURCES)


def require_in_current_folder(name: str, base: Path) -> None:
    """Refuse a folder that lies beside the recipe, where the user is elsewhere.

    Args:
        name: what the recipe names as a model.
        base: the folder of the recipe.

    Raises:
        SetupError: naming both folders.
    """
    path = Path(name).expanduser()
    beside = base / path
    if has_source(name) or path.exists() or not beside.is_dir():
        return
    raise SetupError(
        f"{name}: there is no such folder in {Path.cwd()}, where you are, and models are relative "
        f'to that. There is one beside the recipe: write model = "{beside}", or go to {base}.'
    )


def _kind(name: str) -> str:
    """Return the scheme of a reference, or else its ending."""
    scheme, colon, _ = name.partition(":")
    return f"{scheme}:" if colon and scheme.isidentifier() else Path(name).suffix


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not name.startswith((".", "/", "~"))


def _not_found(name: str, sources: Sequence[str]) -> RotdistillError:
    """Return the error for a reference that is no folder and that no installed source opens."""
    kind = _kind(name)
    if kind.endswith(":"):
        wanted = f'references that begin with "{kind}"'
    elif re.fullmatch(r"\.[A-Za-z]\w*", kind):  # and not the .5 of a model's version
        wanted = f'references that end with "{kind}"'
    elif _is_hub_id(name):
        wanted = "ids of a model hub (owner/name)"
    else:
        return SetupError(
            f"{name}: is neither a folder here nor a Hugging Face id (owner/name). Models are "
            f"relative to the folder that you are in, {Path.cwd()}."
        )
    opened = f"Installed sources open: {', '.join(sources)}." if sources else "None is installed."
    return PluginError(
        f"{name}: there is no such folder, and no installed source opens {wanted}. A source is a "
        f"plugin with an entry point in the group {SOURCES}. {opened} Install one that offers "
        'this kind (search the package index for "rotdistill"), or name a local folder.'
    )
