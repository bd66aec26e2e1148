"""The lines of a ledger, one dataclass for each kind of line.

`kind` names the class of a record, and of a step's result, in JSON. Paths are relative to the
folder of all runs: a step may use files that another run made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from rotdistill_core.store.files import CommittedFile, RunsPath
from rotdistill_core.store.results import Parity, StepReport


def _stored_map(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said of a stored map, if it names a file and the class of the map."""
    if not isinstance(about.get("file"), str) or not isinstance(about.get("kind"), str):
        raise ValueError("names no file, or no kind of map")
    return about


ROW_LENGTHS = range(3, 9)
"""How many fields of a metric row are stated: variant, metric and value at least."""


def _row(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the fields of a metric row, if they can be some."""
    if len(row) not in ROW_LENGTHS:
        raise ValueError("has not as many fields as a metric row")
    variant, metric, value, *_ = row
    is_number = isinstance(value, int | float)
    if not isinstance(variant, str) or not isinstance(metric, str) or not is_number:
        raise ValueError("is no variant, metric and number")
    return row


def _moment(text: str) -> str:
    """Return a date and time in ISO 8601, if it is one."""
    datetime.fromisoformat(text)
    return text


@dataclass(frozen=True)
class _Reference:
    """Base of what a step's result refers to."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields without the kind, as the functions that restore results take them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["kind"]
        return values


@dataclass(frozen=True, kw_only=True)
class ActivationsRef(_Reference):
    """Where captured activations lie; see `ActivationStore`."""

    kind: Literal["activations"] = "activations"
    shards: Mapping[str, tuple[str, ...]]
    """Side -> the shard of each boundary."""
    texts: Mapping[str, tuple[tuple[int, int], ...]]
    """Side -> the captured texts, in the order of the rows: runs [first, end) of their numbers
    among the texts of the run."""
    depths: tuple[int, ...]
    """For each captured student boundary, its boundary in the original student."""
    partners: tuple[int, ...]
    """For each boundary of the original student, the teacher's boundary compared with it."""
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Side -> the file of sums of each boundary, where the rows of a sample alone are kept."""
    replaced: bool = False
    """Whether a control has put other rows in the place of the teacher's."""

    def paths(self) -> Iterator[str]:
        """Yield the files that the result consists of."""
        for files in (*self.shards.values(), *self.sums.values()):
            yield from files


@dataclass(frozen=True, kw_only=True)
class MapsRef(_Reference):
    """Where maps and their diagnostics lie; see `store_maps`."""

    kind: Literal["maps"] = "maps"
    spaces: Mapping[str, Annotated[Mapping[str, Any], AfterValidator(_stored_map)]]
    """Space -> `file`, `kind` (the class of the map) and its other fields."""
    cards: Mapping[Annotated[str, Field(pattern=r"^\d+$")], str]
    """Layer boundary -> the file of its diagnostics."""

    def paths(self) -> Iterator[str]:
        """Yield the files that the result consists of."""
        for space in self.spaces.values():
            yield space["file"]
        yield from self.cards.values()


@dataclass(frozen=True, kw_only=True)
class WeightsRef(_Reference):
    """Where the tensors of an edited student lie; see `Weights.store`."""

    kind: Literal["weights"] = "weights"
    config: Mapping[str, Any]
    """The model's config after the edit."""
    depths: tuple[int, ...]
    """For each layer boundary, its boundary in the original student."""
    basis: str | None
    """The file of the rotation from the original basis, if the basis has changed."""
    tensors: Annotated[Mapping[str, tuple[str, str]], Field(min_length=1)]
    """Parameter -> file and name in the file; an empty file stands for the opened student."""
    undo: str | None = None
    """The file of what takes the edit back (`Undo.tensors`); None unless the step is exact."""

    def paths(self) -> Iterator[str]:
        """Yield the files that the result consists of."""
        for file, _ in self.tensors.values():
            if file:
                yield file
        if self.basis:
            yield self.basis
        if self.undo:
            yield self.undo


@dataclass(frozen=True, kw_only=True)
class RowsRef:
    """What an evaluator measured. Rows are small, so the record holds them itself."""

    kind: Literal["rows"] = "rows"
    rows: tuple[Annotated[tuple[Any, ...], AfterValidator(_row)], ...]
    """The fields of each `MetricRow`."""

    def paths(self) -> Iterator[str]:
        """Yield no file."""
        yield from ()


StepResultRef = ActivationsRef | MapsRef | WeightsRef | RowsRef
"""What a step made. `kind` decides the class."""


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """What a run starts from: models, texts, seed and compute dtype."""

    kind: Literal["start"] = "start"
    key: str
    """Key of everything below; see `start_key`."""
    inputs: Mapping[str, str]
    """Name -> a hash that needs neither tokenizer nor weights, so that `plan` can compare it."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Role -> the sha256 of the model; see `Model.sha256`."""
    recipe: str = ""
    """The recipe's path from the folder of runs: paths in options of its engine are relative to it.
    Older records have none."""

    def paths(self) -> Iterator[str]:
        """Yield no file."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file that a step finished. A step that is killed and run again finds it."""

    kind: Literal["file"] = "file"
    key: str
    """Key of the step, or of the content where steps and runs share the file."""
    name: str
    """The name by which the step finds it again."""
    path: RunsPath
    bytes: int
    sha256: str

    @property
    def file(self) -> CommittedFile:
        """The file that this line commits."""
        return CommittedFile(self.path, self.bytes, self.sha256)

    def paths(self) -> Iterator[str]:
        """Yield the file."""
        yield self.path


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step."""

    kind: Literal["step"] = "step"
    key: str
    before: str
    """Key of the state that the step started from."""
    id: str
    variant: str = ""
    """The variant that an evaluator scored; empty for other steps, which variants share."""
    use: str
    options: Mapping[str, Any]
    plugin: str
    """Distribution and version."""
    seconds: float
    files: tuple[CommittedFile, ...]
    """Every file that the step wrote or found again."""
    result: Annotated[StepResultRef, Field(discriminator="kind")]
    notes: dict[str, Any]
    """Free notes, for people."""
    report: StepReport

    @property
    def is_whole(self) -> bool:
        """Whether a step that is proved exact says how it is undone."""
        undo = self.result.undo if isinstance(self.result, WeightsRef) else None
        return self.report.certificate is None or undo is not None

    def paths(self) -> Iterator[str]:
        """Yield the files of the step and those that its result consists of."""
        yield from (file.path for file in self.files)
        yield from self.result.paths()


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """A step that began and raised. The next run makes it; nothing is reused of this line."""

    kind: Literal["failure"] = "failure"
    key: str
    """Key of the step."""
    id: str
    variant: str
    """The variant for which it was made."""
    plugin: str
    """Distribution and version."""
    when: Annotated[str, AfterValidator(_moment)]
    """In ISO 8601, with the time zone."""
    error: str
    """Class of the error."""
    message: str

    def __str__(self) -> str:
        """Return it as a sentence, in local time."""
        when = datetime.fromisoformat(self.when).astimezone().isoformat(" ", "minutes")[:16]
        return f"{self.variant}: {self.id} failed at {when}: {self.error}: {self.message}"

    def paths(self) -> Iterator[str]:
        """Yield no file."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A saved variant."""

    kind: Literal["checkpoint"] = "checkpoint"
    key: str
    variant: str
    folder: RunsPath
    files: tuple[CommittedFile, ...]

    def paths(self) -> Iterator[str]:
        """Yield the files of the checkpoint."""
        yield from (file.path for file in self.files)


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """An opened model or a saved variant that is computed as transformers computes it."""

    kind: Literal["parity"] = "parity"
    key: str
    """Key of the model, the texts, and the code that compared them."""
    role: str = ""
    """Role of the model in the recipe; empty for a variant."""
    variant: str = ""
    result: Parity

    def paths(self) -> Iterator[str]:
        """Yield no file."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class RemovalRecord:
    """What was removed from a run on purpose, together with its records."""

    kind: Literal["removal"] = "removal"
    steps: tuple[str, ...]
    """Ids of steps."""
    variants: tuple[str, ...]
    """Variants whose checkpoints were removed."""

    def paths(self) -> Iterator[str]:
        """Yield no file."""
        yield from ()


LedgerRecord = (
    StartRecord
    | FileRecord
    | StepRecord
    | FailureRecord
    | CheckpointRecord
    | ParityRecord
    | RemovalRecord
)

_VALIDATOR: TypeAdapter[LedgerRecord] = TypeAdapter(
    Annotated[LedgerRecord, Field(discriminator="kind")]
)


def record_from_json(values: object) -> LedgerRecord:
    """Return the record that a JSON object describes.

    Raises:
        ValueError: it describes none.
    """
    return _VALIDATOR.validate_python(values)


def record_as_json(record: LedgerRecord) -> dict[str, Any]:
    """Return a record as JSON values. Empty fields of a step's report are left out."""
    values = asdict(record)
    if isinstance(record, StepRecord):
        values["report"] = record.report.as_dict()
    return values
