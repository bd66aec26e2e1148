"""Style by a short training run: the teacher's own continuations of the system prompt and a place name, on the logits alone.

Minimises the mean `KL(softmax(h_t W_tᵀ) ‖ student)` over continuation tokens and the shared vocabulary, in the low-rank matrices of a
LoRA `W + s B A` (Hu et al., arXiv:2106.09685). The products are then added to the weights, which is exact; nothing is captured.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from torch import Tensor

    from rotdistill_core.api import Layout, Out, Pair, Progress, Samples, Weights


@step
class PromptKl:
    """Train a LoRA on the teacher's logits behind system prompt and place name, and fold it. Dropped if validation KL does not fall."""

    use: Literal["prompt-kl"] = "prompt-kl"
    train: Literal["lora", "head"] = "lora"
    """Every linear layer of attention and MLP, or only the head; through a LoRA both."""
    rank: PositiveInt = 16
    """Rank of `B A`; its scale s is 2."""
    prompts: PositiveInt = 200
    """How many place names, of the fit and validation texts."""
    tokens: Annotated[int, Field(ge=1, le=256)] = 32
    """Longest continuation, in tokens."""
    epochs: PositiveInt = 3
    """Most passes over the continuations; validation stops earlier."""
    rate: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate of Adam, warmed up and decayed."""
    batch: PositiveInt = 4
    """Continuations in one step."""
    patience: PositiveInt = 2
    """Stop after this many looks at the validation KL (two an epoch) that were no better."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first A and of the order."""

    exact: ClassVar[bool] = False

    @hookimpl
    def style(self, weights: Weights, pair: Pair, samples: Samples, out: Out, progress: Progress) -> Weights:
        """See `Specs.style`."""
        import torch
        from rotdistill_predictions import shared_tokens

        layout = self._continuations(pair, samples, out, progress)
        lesson = Lesson(pair, layout, shared_tokens(pair), progress)
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
                    best, kept = after, {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
                if worse == self.patience:
                    break
        out.notes |= {
            "continuations": len(layout.texts),
            "validation KL": curve,
            "validation KL before": before,
            "validation KL after": best,
        }
        if not kept:
            out.notes["refused"] = "training did not lower the validation KL; the weights are left as they were"
            return weights
        student.load_state_dict(kept, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder, save_embedding_layers=False)
            for path in sorted(Path(folder).glob("adapter_*")):
                out.write(f"weights/{out.step}/adapter/{path.name}", [path.read_bytes()])
        return view.edit({name: (view[name].double() + delta).to(pair.student.dtype) for name, delta in deltas(student)})

    def _continuations(self, pair: Pair, samples: Samples, out: Out, progress: Progress) -> Layout:
        """Return the teacher's greedy continuations, as texts whose answer is the continuation."""
        import json

        from rotdistill_core.answers import greedy
        from rotdistill_core.samples import Layout, Text, prompt_tokens, shared_start

        teacher, asked = pair.teacher, {q.id: q for q in samples.questions if q.place and not q.id.endswith(".own")}
        chosen = list(asked.values())[: self.prompts]
        prompts = {q.id: prompt_tokens(pair.student.tokenizer, samples.style, q.place) for q in chosen}
        kept = out.keyed("continuations", teacher.sha256, json.dumps(prompts), str(self.tokens), str(teacher.dtype), teacher.device.type)
        path = kept.find("answers/continuations.json")
        if path is None:
            progress(0, 1, f"the teacher continues {len(prompts)} prompts")
            path = kept.json("answers/continuations.json", greedy(teacher.folder, prompts, self.tokens, teacher.device, teacher.dtype))
        said: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
        texts = [Text(q.id, q.language, q.split, (*prompts[q.id], *said[q.id]), len(prompts[q.id])) for q in chosen if said[q.id]]
        return Layout(tuple(texts), shared_start([t.tokens[: t.answer] for t in texts]))

    def _with_lora(self, weights: Weights, pair: Pair) -> Any:
        """Return the student as a peft model that trains nothing but its LoRA."""
        from peft import LoraConfig, get_peft_model

        from rotdistill_core.walk import skeleton

        device, dtype, adapter = pair.student.device, pair.student.dtype, weights.adapter
        model: Any = skeleton(weights, dtype)
        model.load_state_dict({n: weights[n].to(device, dtype) for n in weights.entries}, strict=False, assign=True)
        model.tie_weights()
        inside = [n for n, p in adapter.params.items() if len(p.axes) == 2 and n.startswith(adapter.layers)]
        names = [adapter.head] if self.train == "head" else [n for n in inside if n.endswith(".weight")]
        targets = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in names})
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets)
        model.name_or_path = pair.student.ref.model  # peft writes it into the adapter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for an attribute that transformers has renamed
            return get_peft_model(model, config)

    def _steps(self, student: Any, weights: Weights, lesson: Lesson, progress: Progress) -> Iterator[float]:
        """Train, and yield the validation KL twice an epoch."""
        import torch

        texts = [k for k, text in enumerate(lesson.layout.texts) if text.split == "fit"]
        total = self.epochs * -(-len(texts) // self.batch)
        adam = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=self.rate, weight_decay=0.0)
        warm = max(1, total // 20)
        rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min(1.0, (n + 1) / warm) * (1 - n / (total + 1)))
        looks = {round(total * k / (2 * self.epochs)) for k in range(1, 2 * self.epochs + 1)}
        done = 0
        for _ in range(self.epochs):
            order = torch.randperm(len(texts)).tolist()
            for k in range(0, len(order), self.batch):
                loss = lesson.losses(student, weights, [texts[j] for j in order[k : k + self.batch]]).mean()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                adam.step()
                adam.zero_grad()
                rates.step()
                done += 1
                progress(done, total, f"KL {loss.item():.3f}")
                if done in looks:
                    yield lesson.kl(student, weights, "validation")


class Lesson:
    """The continuations, and the teacher's final states at their tokens."""

    def __init__(self, pair: Pair, layout: Layout, tokens: int, progress: Progress) -> None:
        from rotdistill_core.walk import Walk

        self.pair, self.layout, self.tokens = pair, layout, tokens
        walk = Walk(pair.teacher.weights, layout, pair.teacher.device, pair.teacher.dtype)
        for i in walk:
            walk.run()
            progress(i + 1, pair.teacher.depth, f"teacher on {layout.rows} rows")
        self.states = walk.states
        self.head = pair.teacher.weights.head()[:tokens].to(walk.states.dtype)

    def losses(self, student: Any, weights: Weights, texts: list[int]) -> Tensor:
        """Return the KL of every continuation token of some texts [n]."""
        import torch

        from rotdistill_core.walk import log_probabilities

        device, adapter = self.pair.student.device, weights.adapter
        some = [self.layout.texts[k] for k in texts]
        longest = max(len(text.tokens) for text in some)
        ids, mask = torch.zeros(len(some), longest, dtype=torch.long), torch.zeros(len(some), longest, dtype=torch.long)
        wanted, rows = torch.zeros(len(some), longest, dtype=torch.bool), []
        for b, (k, text) in enumerate(zip(texts, some, strict=True)):
            n, first = len(text.tokens), self.layout.starts[k] - self.layout.prefix
            ids[b, :n], mask[b, :n] = torch.tensor(text.tokens), 1
            wanted[b, text.answer - 1 : n - 1] = True
            rows.append(torch.arange(first + text.answer - 1, first + n - 1))
        base = student.get_base_model()
        body = base.get_submodule(adapter.body)
        states = body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0][wanted.to(device)]
        made = base.get_submodule(adapter.head.removesuffix(".weight"))(states)[:, : self.tokens]
        cap = weights.config.get(adapter.softcap_key)
        q = (made if cap is None else cap * (made / cap).tanh()).log_softmax(-1)
        p = log_probabilities(self.pair.teacher.weights, self.states[torch.cat(rows)], self.head, self.tokens).to(q)
        kl: Tensor = (p.exp() * (p - q)).sum(-1)
        return kl

    def kl(self, student: Any, weights: Weights, split: str) -> float:
        """Return the mean KL over the continuation tokens of a split, nats."""
        import torch

        texts = [k for k, text in enumerate(self.layout.texts) if text.split == split]
        with torch.no_grad():
            parts = [self.losses(student, weights, texts[k : k + 4]) for k in range(0, len(texts), 4)]
        return float(torch.cat(parts).double().mean())


def deltas(student: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter of the plain model, `s B A` in float64) of every layer with a LoRA."""
    for name, module in student.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield f"{name}.weight", (module.scaling["default"] * (B.double() @ A.double())).detach().cpu()


@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [PromptKl]
