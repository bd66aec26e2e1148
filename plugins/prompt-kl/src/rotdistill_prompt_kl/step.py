"""Style by a short training run: the teacher's own continuations of the system prompt and a place name, on the logits alone.

Minimises the mean `KL(softmax(h_t W_tᵀ) ‖ student)` over the tokens that the teacher wrote, in the low-rank matrices of a LoRA
`W + s B A` (Hu et al., arXiv:2106.09685). The products are then added to the weights, which is exact; nothing is captured.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step
from rotdistill_core.planning.cost import Cost, CostContext, forward_cost

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.checkpoint.models import Pair
    from rotdistill_core.checkpoint.weights import Weights
    from rotdistill_core.data.packed import PackedTexts, Samples, Text
    from rotdistill_core.forward.layerwise import Progress
    from rotdistill_core.store.output import StepOutput
    from rotdistill_prompt_kl._targets import DistillationTargets


@step
class PromptKl:
    """Train a LoRA on the teacher's own continuations of system prompt and place names, shortly, and fold it into the weights.

    Needs no capture. Nothing changes when that is no gain in validation KL beyond chance, text by text.
    """

    use: Literal["prompt-kl"] = "prompt-kl"
    train: Literal["lora", "head"] = "lora"
    """`"lora"`: every linear layer of attention and MLP. `"head"`: only the head (untied first), through a LoRA too."""
    rank: PositiveInt = 16
    """Rank of the LoRA `B A`; its scale s is 2."""
    ask: Annotated[tuple[Literal["places", "questions"], ...], Field(min_length=1)] = ("places",)
    """Behind what the teacher goes on: `"places"` by themselves, the `"questions"` of the blurbs (which it then answers:
    `samples.own_answers`), or both."""
    part: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Learn from the k-th of n parts of the fit texts: `[2, 3]` is the second third. What another step learns from another part can be
    merged (`soups`)."""
    prompts: PositiveInt = 200
    """How many place names, of the fit and validation texts."""
    tokens: Annotated[int, Field(ge=1, le=256)] = 32
    """Longest continuation, in tokens."""
    epochs: PositiveInt = 3
    """Most passes over the continuations; validation stops earlier."""
    rate: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate of Adam, warmed up and decayed."""
    bfloat16: bool = False
    """Multiply in bfloat16 while training: four times as fast on a processor with AMX or a GPU, slow on others."""
    batch: PositiveInt = 4
    """Continuations in one step."""
    patience: PositiveInt = 2
    """Stop after this many looks at the validation KL (two an epoch) without gain."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first A and of the order."""
    guard: Annotated[float, Field(ge=1)] | None = None
    """Take only so much of the LoRA (all, 1/2, 1/4, 1/10) that the KL on the guard's validation half is at most this multiple of what it
    was (1.02: 2 % worse)."""

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a part that is not there."""
        if self.part[0] > self.part[1]:
            raise ValueError(f"part: there is no part {self.part[0]} of {self.part[1]}")

    def cost(self, context: CostContext) -> Cost:
        """The student whole, activations of a batch, and the teacher's final states of all texts."""
        student, teacher, texts = context.student, context.teacher, context.texts
        rows, number = texts.rows_of("fit", "validation"), context.student_bytes
        count = max(texts.texts.get("fit", 0) + texts.texts.get("validation", 0), 1)
        length = (rows - texts.prefix) / count + texts.prefix
        # Half of the texts are the teacher's own answers to questions.
        asked = {"places": min(self.prompts, count / 2), "questions": count / 2}
        batch = self.batch * length * number
        activations = batch * (
            student.depth * (14 * student.width + 6 * student.neurons) + 4 * student.vocab
        )
        trained = sum(asked[what] for what in self.ask) * length * self.epochs
        speed = 4 if self.bfloat16 else 1
        made = student.parameters(inside=True) * number
        heads = student.vocab * (student.width + teacher.width) * number
        states = rows * teacher.width * number
        teacher_walk = forward_cost(teacher, rows, context.teacher_bytes)
        return Cost(
            host_bytes=states + made + heads,
            device_bytes=student.parameters() * number + activations,
            disk_bytes=states + made,
            operations=6.0 * student.parameters() * trained / speed + teacher_walk.operations,
            read_bytes=student.bytes + teacher_walk.read_bytes,
            traffic_bytes=student.parameters() * number + teacher_walk.traffic_bytes,
        )

    @hookimpl
    def style(
        self, weights: Weights, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> Weights:
        """See `Specs.style`."""
        import torch

        from rotdistill_core.evaluation.acceptance import accept_if_better
        from rotdistill_core.evaluation.divergence import shared_vocabulary
        from rotdistill_prompt_kl._targets import DistillationTargets

        layout = self._texts(pair, samples, out, progress)
        lesson = DistillationTargets(
            pair, layout, shared_vocabulary(pair), out, progress, self.bfloat16
        )
        view = weights.untie() if self.train == "head" else weights
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            student = self._with_lora(view, pair)
            before = best = lesson.kl(student, view, "validation")
            kept: dict[str, Tensor] = {}
            curve, worse = [before], 0
            for after in self._steps(student, view, lesson, progress):
                curve.append(after)
                worse = 0 if after < best else worse + 1
                if after < best:
                    best, kept = (
                        after,
                        {
                            n: p.detach().clone()
                            for n, p in student.named_parameters()
                            if p.requires_grad
                        },
                    )
                if worse == self.patience:
                    break
        out.notes |= {
            "texts": len([t for t in layout.texts if not t.plain]),
            "validation KL by look": curve,
        }
        if not kept:
            out.report.refused = (
                "training did not lower the validation KL; the weights are left as they were"
            )
            return weights
        student.load_state_dict(kept, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder, save_embedding_layers=False)
            for path in sorted(Path(folder).glob("adapter_*")):
                out.write(f"weights/{out.step}/adapter/{path.name}", [path.read_bytes()])
        made = view.edit(
            {
                name: (view[name].double() + delta).to(pair.student.dtype)
                for name, delta in deltas(student)
            }
        )
        del (
            student,
            kept,
        )  # the guard walks `made` layer by layer; the model that trained is not needed for it
        return accept_if_better(
            weights,
            made,
            lambda some, split: lesson.scores(some, split, samples),
            self.guard,
            out,
        )

    def _texts(
        self, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> PackedTexts:
        """Return what the teacher says, as texts whose answer is that, and the guard's texts where there is a guard."""
        from rotdistill_core.data.packed import PackedTexts
        from rotdistill_core.data.tokenization import shared_prefix_length
        from rotdistill_core.errors import RecipeError

        own = {q.id for q in samples.questions if q.answer is None and q.split != "heldout"}
        answers = (
            [t for t in samples.layout.texts if t.id in own] if "questions" in self.ask else []
        )
        outside = (
            [t for t in samples.layout.texts if t.split == "guard-validation"] if self.guard else []
        )
        if "questions" in self.ask and not answers:
            raise RecipeError(
                'prompt-kl: ask = ["questions"] learns from the teacher\'s answers; let it write some: samples.own_answers = 64.'
            )
        if pair.student.adapter.fused:
            raise RecipeError(
                f"prompt-kl: a {pair.student.config['model_type']} model keeps projections fused, which no LoRA here trains."
            )
        if self.guard and not outside:
            raise RecipeError(
                "prompt-kl: guard needs texts outside the domain; name them as samples.guard."
            )
        said = self._continuations(pair, samples, out, progress) if "places" in self.ask else []
        return PackedTexts(
            (*said, *answers, *outside),
            shared_prefix_length([t.tokens[: t.answer] for t in (*said, *answers)]),
        )

    def _continuations(
        self, pair: Pair, samples: Samples, out: StepOutput, progress: Progress
    ) -> list[Text]:
        """Return the teacher's greedy continuations of the prompt and place names."""
        import json

        from rotdistill_core.data.packed import Text
        from rotdistill_core.data.tokenization import prompt_tokens
        from rotdistill_core.forward.generate import greedy_answers

        teacher, asked = (
            pair.teacher,
            {q.id: q for q in samples.questions if q.place and not q.id.endswith(".own")},
        )
        chosen = list(asked.values())[: self.prompts]
        prompts = {
            q.id: prompt_tokens(pair.student.tokenizer, samples.style, q.place) for q in chosen
        }
        kept = out.shared(
            "continuations",
            teacher.sha256,
            json.dumps(prompts),
            str(self.tokens),
            str(teacher.dtype),
            teacher.device.type,
        )
        said: dict[str, list[int]]
        path = kept.find("answers/continuations.json")
        if path is None:
            said = greedy_answers(
                teacher.folder, prompts, self.tokens, teacher.device, teacher.dtype, progress
            )
            path = kept.json("answers/continuations.json", said)
        said = json.loads(path.read_text(encoding="utf-8"))
        return [
            Text(
                f"{q.id}.place",
                q.language,
                q.split,
                (*prompts[q.id], *said[q.id]),
                len(prompts[q.id]),
            )
            for q in chosen
            if said[q.id]
        ]

    def _with_lora(self, weights: Weights, pair: Pair) -> Any:
        """Return the student as a peft model that trains nothing but its LoRA."""
        from peft import LoraConfig, get_peft_model

        from rotdistill_core.forward.layerwise import meta_model

        device, dtype, adapter = pair.student.device, pair.student.dtype, weights.adapter
        model: Any = meta_model(weights, dtype)
        model.load_state_dict(
            {n: weights[n].to(device, dtype) for n in weights.entries}, strict=False, assign=True
        )
        model.tie_weights()
        inside = [
            n
            for n, p in adapter.params.items()
            if len(p.axes) == 2 and n.startswith(adapter.layers)
        ]
        names = (
            [adapter.head] if self.train == "head" else [n for n in inside if n.endswith(".weight")]
        )
        targets = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in names})
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets)
        model.name_or_path = pair.student.ref.model  # peft writes it into the adapter
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft asks for an attribute that transformers has renamed
            return get_peft_model(model, config)

    def _steps(
        self, student: Any, weights: Weights, lesson: DistillationTargets, progress: Progress
    ) -> Iterator[float]:
        """Train, and yield the validation KL twice an epoch."""
        import torch

        first, parts = self.part
        texts = [k for k, text in enumerate(lesson.layout.texts) if text.split == "fit"][
            first - 1 :: parts
        ]
        total = self.epochs * -(-len(texts) // self.batch)
        adam = torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad], lr=self.rate, weight_decay=0.0
        )
        warm = max(1, total // 20)
        rates = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda n: min(1.0, (n + 1) / warm) * (1 - n / (total + 1))
        )
        looks = {round(total * k / (2 * self.epochs)) for k in range(1, 2 * self.epochs + 1)}
        done = 0
        for _ in range(self.epochs):
            order = torch.randperm(len(texts)).tolist()
            for k in range(0, len(order), self.batch):
                loss = lesson.losses(
                    student, weights, [texts[j] for j in order[k : k + self.batch]]
                ).mean()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                adam.step()
                adam.zero_grad()
                rates.step()
                done += 1
                progress(done, total, f"KL {loss.item():.3f}")
                if done in looks:
                    yield lesson.kl(student, weights, "validation")


def deltas(student: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter of the plain model, `s B A` in float64) of every layer with a LoRA."""
    for name, module in student.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield (
                f"{name}.weight",
                (module.scaling["default"] * (B.double() @ A.double())).detach().cpu(),
            )


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [PromptKl]
