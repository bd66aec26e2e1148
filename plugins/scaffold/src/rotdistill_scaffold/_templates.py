"""What `new` writes. `$name` and the like are filled in by `string.Template`."""

from __future__ import annotations

PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "rotdistill-$distribution"
version = "0.1.0"
description = "$title"
readme = "README.md"
requires-python = ">=3.11"
dependencies = [$dependencies]

[project.entry-points$group]
$name = "$module"

[tool.hatch.build.targets.wheel]
only-include = ["$module.py"]
"""

STEP = '''"""$title"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ${classvar}Literal

from pydantic import Field

from rotdistill_core import hookimpl, step

if TYPE_CHECKING:
    from rotdistill_core import $types


@step
class $cls:
    """Say here what it does. Recipes choose it with `use = "$name"`; its stage follows from the hook below."""

    use: Literal["$name"] = "$name"
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """An option: what stands here is its help in editors."""
$exact
    @hookimpl
    def $stage(self, $arguments) -> $returns:
        """See `Specs.$stage`."""
$body

@hookimpl
def steps() -> list[type]:
    """Offer the step."""
    return [$cls]
'''

EXACT = '''
    exact: ClassVar[bool] = False
    """True for a change of basis: the pipeline then proves that logits stay."""
'''

STAGES = {
    "capture": (
        "pair: Pair, weights: Weights, samples: Samples, out: StepOutput, progress: Progress", "ActivationStore",
        '''        from rotdistill_core.forward.activations import ActivationStore, write_shard
        from rotdistill_core.forward.layerwise import LayerwiseForward

        shards: dict[str, tuple[str, ...]] = {}
        for side, model, view in (("teacher", pair.teacher, pair.teacher.weights), ("student", pair.student, weights)):
            walk = LayerwiseForward(view, samples.layout, model.device, model.dtype)
            made = [write_shard(out, side, 0, walk.states * self.strength, model.dtype, {})]
            for i in walk:  # one layer of the model is open at a time
                walk.run()
                made.append(write_shard(out, side, i + 1, walk.states * self.strength, model.dtype, {}))
                progress(i + 1, view.depth, side)
            shards[side] = tuple(made)
        partners = tuple(pair.teacher_depth(boundary) for boundary in range(pair.student.depth + 1))
        return ActivationStore(out.store.root, shards, {"teacher": samples.layout, "student": samples.layout}, weights.lineage.depths, partners)
''',
    ),
    "align": (
        "activations: ActivationStore, maps: Maps, pair: Pair", "Maps",
        '''        import torch

        from rotdistill_core.forward.activations import massive_activation_mask, rms_normalise
        from rotdistill_core.errors import RecipeError
        from rotdistill_core.linalg.maps import Rotation
        from rotdistill_core.moments import polar

        d_s, d_t = pair.student.width, pair.teacher.width
        if d_s > d_t:
            raise RecipeError(f"$name: the student is wider ({d_s}) than the teacher ({d_t}).")
        side = activations.layouts["student"]
        M = torch.zeros(d_s, d_t, dtype=torch.float64)
        for boundary, depth in enumerate(activations.depths):
            S, T = activations.rows("student", boundary), activations.teacher(side, depth)
            use = side.split("fit") & ~massive_activation_mask(S) & ~massive_activation_mask(T) & activations.paired(side)
            M += rms_normalise(S[use]).T @ rms_normalise(T[use])
        M = self.strength * M + (1 - self.strength) * torch.eye(d_s, d_t, dtype=torch.float64)
        R, _ = polar(M, "$name")  # the best map with R Rt = I
        return maps.add({f"residual.{boundary}": Rotation(R) for boundary in range(len(activations.depths))}, {})
''',
    ),
    "refine": (
        "maps: Maps", "Maps",
        '''        found = {}
        for space, one in maps.items():
            found[space] = one  # improve it here
        return maps.add(found, {})
''',
    ),
    "fold": (
        "weights: Weights", "Weights",
        '''        name = weights.adapter.norm  # the gain of the last norm: every logit grows with it
        return weights.edit({name: weights[name] * self.strength})
''',
    ),
    "style": (
        "weights: Weights", "Weights",
        '''        head = weights.adapter.head
        return weights.untie().edit({head: weights.head() * self.strength})
''',
    ),
    "evaluate": (
        "variant: Variant", "list[MetricRow]",
        '''        from rotdistill_core.evaluation.rows import MetricRow

        norm = float(variant.weights.head().double().norm())
        return [MetricRow(variant.name, "$snake", self.strength * norm)]
''',
    ),
}  # fmt: skip
"""Stage -> arguments of its hook, what that returns, and a body that works."""

STEP_TEST = '''"""$cls keeps to what every step must keep to."""

from collections.abc import Callable
from pathlib import Path

from $module import $cls
from rotdistill_core.testing import parametrize_with_checks


@parametrize_with_checks($cls, {}, {"strength": 0.5})
def test_it_conforms(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)
'''

ADAPTER = '''"""Checkpoints of model type `$name`."""

from __future__ import annotations

from rotdistill_core.architecture.rope_decoder import rope_decoder

from rotdistill_core import hookimpl
from rotdistill_core.architecture.table import Adapter

# Say what differs from Llama; the tests log which tensor is not claimed, or claimed wrongly:
# biases=("q", "k", "v"), optional_biases=("o",), head_norms=("q_norm", "k_norm"), output_norms=("post_attention_layernorm", ...),
# gain_offset=1.0, softcap_key="final_logit_softcapping", fused={...}, defaults=..., refuses={...}
TABLE = rope_decoder(("$name",))


@hookimpl
def adapters() -> list[Adapter]:
    """Offer the table."""
    return [TABLE]
'''

ADAPTER_TEST = '''"""The table of `$name` against pico checkpoints of plain transformers."""

from collections.abc import Callable
from pathlib import Path

from $module import TABLE
from rotdistill_core.testing import parametrize_with_checks

CASES = (
    {"head_dim": 12, "intermediate_size": 56},  # sizes that nothing else has, so that a mistake can be named
    {"tie_word_embeddings": False, "num_key_value_heads": 4},
)


@parametrize_with_checks(TABLE, *CASES)
def test_the_table_holds(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)
'''

README = """# $distribution

$title

```
pip install --no-build-isolation --no-deps -e .
python -m pytest tests
rotdistill plugins
```
"""

RECIPE = """# What it does, in a line.
name = "$name"
seed = 0

[teacher]
model = "$model"      # or a folder, a .gguf file, a Hugging Face id

[student]
model = "$model"

[samples]
index = "$samples/index.tsv"
style = "$samples/tour_guide.md"
heldout = "$samples/heldout.tsv"

[[step]]
use = "chop"                  # here the student is the teacher without some layers; goes where the student is another model
layers = 22

[[step]]
use = "residuals"             # capture both streams, every layer

[[step]]
id = "basis"
use = "procrustes"            # one rotation for the whole stream

[[step]]
id = "fold"
use = "basis-fold"            # exact: a change of basis
mode = "canonical"

[[step]]
id = "head"
use = "lm-head-ridge"         # transfer: the head learns the teacher's logits

[[step]]
use = "fidelity"               # what each variant predicts, word by word

[variants]
base = []
rotated = ["basis", "fold"]
full = ["basis", "fold", "head"]
"""
