"""Where the files of a run lie: every name, once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

RUNS_FOLDER = Path("runs")
"""The folder of all runs, relative to the current folder."""
MODEL_HASHES = "model_hashes.json"
"""In the user's cache: the sha256 of model files that runs have read."""
CALIBRATION = "calibration.json"
"""In the user's cache: how fast this machine works."""


@dataclass(frozen=True)
class RunLayout:
    """The files of one run. Constants and static methods are names relative to `folder`."""

    folder: Path

    RECIPE = "recipe.toml"
    RESOLVED_RECIPE = "recipe.resolved.json"
    SYSTEM_PROMPT = "system.md"
    TEXTS = "samples.tsv"
    LESSONS = "lessons.json"
    LEDGER = "ledger.jsonl"
    RESULTS = "results.jsonl"
    REPORT_HTML = "report.html"
    REPORT_MARKDOWN = "report.md"
    REPORT_JSON = "report.json"
    CHECKPOINTS = "checkpoints"
    MANIFEST = "COMPLETE"
    """In a checkpoint's folder: the sha256 of each of its files; written last."""
    CARD = "README.md"
    """In a checkpoint's folder."""
    CONFIG = "config.json"
    """In a checkpoint's folder."""
    UNDO = "undo.safetensors"
    """Among a step's weights: what takes an exact fold back."""
    CHANGED_TENSORS = "changed.safetensors"
    """Among a step's weights: the parameters that the step changed."""
    BASIS = "basis.safetensors"
    """Among a step's weights: the rotation from the student's original basis."""
    FINAL_STATES = "shards/final.safetensors"
    """The teacher's states after the last layer."""
    ROW_PAIRS = "shards/spans.safetensors"
    """Which rows of two tokenizers belong together."""
    PAIRING_TABLE = "alignment.tsv"
    """How many rows of each text were paired."""
    LAYER_MAP = "layer_map.json"
    """Which layers were matched, with their R²."""

    @property
    def recipe(self) -> Path:
        """The recipe as written."""
        return self.folder / self.RECIPE

    @property
    def resolved_recipe(self) -> Path:
        """The recipe after `extends`, `--set` and defaults."""
        return self.folder / self.RESOLVED_RECIPE

    @property
    def system_prompt(self) -> Path:
        """The system prompt of the texts."""
        return self.folder / self.SYSTEM_PROMPT

    @property
    def texts(self) -> Path:
        """The texts of the run with their hashes, frozen."""
        return self.folder / self.TEXTS

    @property
    def lessons(self) -> Path:
        """How many lessons the teacher wrote, what was dropped and why, and some of them."""
        return self.folder / self.LESSONS

    @property
    def ledger(self) -> Path:
        """The ledger; its lines commit files."""
        return self.folder / self.LEDGER

    @property
    def results(self) -> Path:
        """Metric rows of all variants."""
        return self.folder / self.RESULTS

    @property
    def report(self) -> Path:
        """The report as one page."""
        return self.folder / self.REPORT_HTML

    @property
    def checkpoints(self) -> Path:
        """One folder for each variant."""
        return self.folder / self.CHECKPOINTS

    @staticmethod
    def answer_chunks(series: str) -> str:
        """Return how the names of all chunks of a series of answers begin."""
        return f"answers/{series}/"

    @classmethod
    def answers(cls, series: str, chunk: int) -> str:
        """Return the name of one chunk of a series of answers; chunks count from 0."""
        return f"{cls.answer_chunks(series)}{chunk:05d}.json"

    @staticmethod
    def shard(side: str, boundary: int) -> str:
        """Return the name, without its ending, of one side's residual stream at a boundary."""
        return f"shards/{side}/residual/{boundary:05d}"

    @staticmethod
    def begun_states(side: str) -> str:
        """Return the name of one side's states at a boundary that a killed capture goes on from."""
        return f"shards/{side}/residual/begun.safetensors"

    @staticmethod
    def sums(side: str, boundary: int) -> str:
        """Return the name of the sums over the rows of the student and a side at a boundary."""
        return f"sums/{side}/{boundary:05d}.safetensors"

    @staticmethod
    def begun_sums(side: str) -> str:
        """Return the name of all sums with a side while blocks are added."""
        return f"sums/{side}/begun.safetensors"

    @staticmethod
    def frame(boundary: int) -> str:
        """Return the name of the rotation in which hidden states are compared at a boundary."""
        return f"frames/{boundary:05d}.safetensors"

    @staticmethod
    def attention_maps(layer: int) -> str:
        """Return the name of a layer's attention maps in one text."""
        return f"attention/layer_{layer}.safetensors"

    @staticmethod
    def weights(step: str, name: str) -> str:
        """Return the name of a file of weights that a step made."""
        return f"weights/{step}/{name}"

    @classmethod
    def adapter(cls, step: str, name: str) -> str:
        """Return the name of a file of the LoRA that a step made, in peft's format."""
        return cls.weights(step, f"adapter/{name}")

    @staticmethod
    def training(step: str, file: int) -> str:
        """Return the name of one of the files that a killed training goes on from."""
        return f"training/{step}/{file}.safetensors"

    @classmethod
    def writer(cls, step: str, layer: int, site: str) -> str:
        """Return the name, without its ending, of a writer that a step solved."""
        return cls.weights(step, f"layer_{layer:05d}_{site}")

    @staticmethod
    def rotation(run: str, name: str) -> str:
        """Return the name of a file that holds a map."""
        return f"rotations/{run}/{name}.safetensors"

    @staticmethod
    def diagnostics(run: str, boundary: int) -> str:
        """Return the name of the document of what was measured at a layer boundary."""
        return f"rotations/{run}/layer_{boundary}.json"

    @staticmethod
    def model_shard(number: int, count: int) -> str:
        """Return the name that Hugging Face gives to a checkpoint's shard; numbers start at 1."""
        if count == 1:
            return "model.safetensors"
        return f"model-{number:05d}-of-{count:05d}.safetensors"

    @classmethod
    def checkpoint(cls, variant: str, name: str) -> str:
        """Return the name of a file of a variant's checkpoint."""
        return f"{cls.CHECKPOINTS}/{variant}/{name}"


def user_cache() -> Path:
    """Return the folder of what can be made again, in `XDG_CACHE_HOME` or else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rotdistill"


def ledger_paths(root: Path) -> list[Path]:
    """Return the ledgers of all runs in a folder, sorted by the name of the run."""
    return sorted(root.glob(f"*/{RunLayout.LEDGER}"))
