"""Train a student by another library, for a given time; `transfer.py` calls this for each peer.

    pip install trl peft     # versions that fit constraints.txt; the package itself needs no trl
    python benchmarks/peers.py gkd --teacher FOLDER --student FOLDER --texts texts.jsonl \\
        --seconds 1200 --rate 5e-4 --out FOLDER

`gkd` is TRL's `GKDTrainer` on the given texts alone (`lmbda = 0`) with the forward KL (`beta = 0`);
`sft` is TRL's `SFTTrainer`, which never sees the teacher. Both train a LoRA of peft like that of
`prompt-kl`: the same rank, scale, matrices, batch, optimiser and clipping, in float32. The rate
rises over the first twentieth of the time and falls to 0 at its end. The time is that of training:
loading the models, validation and writing are not in it. What was trained is merged and saved as a
plain folder; `OUT/peer.json` has the time, the memory, the texts seen and the validation KL.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peak_memory import PeakMemory
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of attention and MLP."""
IGNORED = -100
"""The label of a token that no loss counts."""
MANY = 1000
"""More epochs than any time allows."""
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.monotonic,
    "processor": time.process_time,
}
"""What `--seconds` counts. On a machine with other work the processor time of one thread is what
the wall time would be without it."""


class Budget(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Ends a training when its time is spent.

    Args:
        seconds: the time.
        clock: a key of `CLOCKS`.
    """

    def __init__(self, seconds: float, clock: str) -> None:
        self.seconds = seconds
        self.clock = clock
        self._begun: dict[str, float] = {}

    def spent(self, clock: str) -> float:
        """Return the seconds of a clock since training began."""
        return CLOCKS[clock]() - self._begun[clock] if self._begun else 0.0

    def rate(self, _: int) -> float:
        """Return the learning rate as a share of its peak."""
        share = min(self.spent(self.clock) / self.seconds, 1.0)
        return min(1.0, 20 * share + 0.05) * (1 - share)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clocks."""
        self._begun = {name: clock() for name, clock in CLOCKS.items()}

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Stop after the step in which the time ends."""
        control.should_training_stop = self.spent(self.clock) >= self.seconds


def main() -> None:
    """Train, save, and write what it took."""
    options = _options()
    torch.manual_seed(options.seed)
    texts = [json.loads(line) for line in options.texts.read_text(encoding="utf-8").splitlines()]
    budget = Budget(options.seconds, options.clock)
    with PeakMemory() as memory:
        student = get_peft_model(
            AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
            LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS),
        )
        fit = [text for text in texts if text["split"] == "fit"]
        trainer = made_trainer(options, student, fit, budget)
        trainer.train()
    steps = trainer.state.global_step
    taken = {name: round(budget.spent(name), 1) for name in CLOCKS}
    validation = [text for text in texts if text["split"] == "validation"]
    merged = student.merge_and_unload().eval()
    record = {
        "trainer": options.trainer,
        "rate": options.rate,
        "seconds": taken,
        "clock": options.clock,
        "steps": steps,
        "texts": steps * options.batch_size,
        "fit texts": len(fit),
        "memory": memory.bytes,
        "validation KL": mean_kl(loaded_teacher(options), merged, validation),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "peft", "transformers", "torch")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.no_model:
        merged.save_pretrained(options.out)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (options.student / name).is_file():
                shutil.copy(options.student / name, options.out / name)
    (options.out / "peer.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trainer", choices=("gkd", "sft"))
    parser.add_argument("--teacher", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--student", type=Path, required=True, help="where training begins")
    parser.add_argument("--texts", type=Path, required=True, help="texts.jsonl of transfer.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--rate", type=float, required=True, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-model", action="store_true", help="write peer.json alone")
    return parser.parse_args()


def made_trainer(
    options: argparse.Namespace, student: Any, fit: Sequence[dict[str, Any]], budget: Budget
) -> Any:
    """Return TRL's trainer of a peft model on the texts to fit."""
    settings: dict[str, Any] = {
        "output_dir": str(options.out / "trainer"),
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.batch_size // options.micro_batch_size,
        "num_train_epochs": MANY,
        "learning_rate": options.rate,
        "max_grad_norm": 1.0,
        "seed": options.seed,
        "use_cpu": not torch.cuda.is_available(),
        # By default TRL computes in bfloat16 and recomputes activations.
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.rate, weight_decay=0.0)
    common: dict[str, Any] = {
        "model": student,
        "train_dataset": Dataset.from_list(
            [{"tokens": text["tokens"], "answer": text["answer"]} for text in fit]
        ),
        "data_collator": padded,
        "processing_class": AutoTokenizer.from_pretrained(options.student),
        "callbacks": [budget],
        "optimizers": (optimizer, LambdaLR(optimizer, budget.rate)),
    }
    if options.trainer == "sft":
        return SFTTrainer(args=SFTConfig(**settings), **common)
    return GKDTrainer(
        args=GKDConfig(**settings, lmbda=0.0, beta=0.0),
        teacher_model=loaded_teacher(options),
        **common,
    )


def loaded_teacher(options: argparse.Namespace) -> Any:
    """Return the teacher in float32."""
    return AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()


def padded(texts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return texts as a batch `[texts, longest]`, padded on the right; labels are the answers."""
    shape = len(texts), max(len(text["tokens"]) for text in texts)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, text in enumerate(texts):
        length = len(text["tokens"])
        ids[row, :length] = torch.tensor(text["tokens"])
        mask[row, :length] = 1
        labels[row, text["answer"] : length] = ids[row, text["answer"] : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def mean_kl(teacher: Any, student: Any, texts: Sequence[dict[str, Any]]) -> float:
    """Return the mean KL to the teacher over the tokens of all answers, nats."""
    values = []
    for text in texts:
        ids = torch.tensor([text["tokens"]], device=student.device)
        answer = slice(text["answer"] - 1, -1)
        P, Q = (
            model(input_ids=ids).logits[0, answer].float().log_softmax(-1)
            for model in (teacher.to(student.device), student)
        )
        values.append((P.exp() * (P - Q)).sum(-1))
    return float(torch.cat(values).mean())


if __name__ == "__main__":
    main()
