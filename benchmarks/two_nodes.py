"""One run on two machines, which are two network namespaces: its bits, and the bytes between them.

    python benchmarks/two_nodes.py [--width 128] [--rate 1gbit]       as root, on Linux

The namespaces are joined by a pair of virtual interfaces of a limited rate, and share the disk.
torchrun starts a process in each. The same recipe runs in one process, too. Its files have to have
the same hashes, and what each machine sends has to be what `rotdistill plan --nodes 2` says, to a
tenth; the exit code is 1 where one of them fails. One recipe captures sums, the other one captures
rows and refits what writes into the stream.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rotdistill_core.testing import PicoWorkspace
from rotdistill_core.testing.pico import WORDS

NAMES = ("rotdistill0", "rotdistill1")
"""Of the namespaces, and of the interfaces in them."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29577
TEXTS = 240
SHARE = 0.1
"""How far the bytes may be from those of the plan."""
RECIPES = {
    "sums": """
variants = { base = [], full = ["basis", "fold"] }
step = [
    { use = "residuals", store = "moments" },
    { id = "basis", use = "procrustes" },
    { id = "fold", use = "basis-fold" },
    { use = "fidelity" },
]
""",
    "refit": """
variants = { base = [], full = ["refit"] }
step = [
    { use = "chop", layers = 2 },
    { use = "residuals" },
    { id = "refit", use = "writer-refit", writers = ["heads", "neurons"] },
    { use = "fidelity" },
]
""",
}


def main() -> None:
    """Run both recipes both ways, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=128, help="of the models")
    parser.add_argument("--rate", default="1gbit", help="of the link, as tc takes it")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(two_machines(options.rate))
        workspace = PicoWorkspace(folder)
        write_texts(workspace)
        heads = {"hidden_size": options.width, "num_attention_heads": 8, "num_hidden_layers": 3}
        teacher = workspace.model("teacher", **heads)
        student = workspace.model("student", seed=1, **heads)
        held = [
            measured(workspace, name, teacher, student if name == "sums" else teacher)
            for name in RECIPES
        ]
    sys.exit(0 if all(held) else 1)


def measured(workspace: PicoWorkspace, name: str, teacher: Path, student: Path) -> bool:
    """Carry out a recipe both ways and print what was found; return whether it is as it should."""
    recipe = workspace.recipe(RECIPES[name], name=name, teacher=teacher, student=student)
    one, two = (workspace.folder / f"{name}-{count}" for count in (1, 2))
    for folder in (one, two):
        folder.mkdir()
    plan = json.loads(done([*rotdistill("plan", recipe), "--nodes", "2", "--json"], two))
    planned = plan["cluster"]["traffic_bytes"]
    done(rotdistill("run", recipe), one)
    before = sent_bytes()
    run_on_both(recipe, two)
    sent = [after - start for after, start in zip(sent_bytes(), before, strict=True)]
    same = hashes(one) == hashes(two)
    ratio = sum(sent) / len(sent) / planned
    megabytes = " and ".join(f"{each / 1e6:.2f}" for each in sent)
    print(
        f"{name}: {'the same' if same else 'OTHER'} bits in {len(hashes(two))} files; "
        f"sent {megabytes} MB, planned {planned / 1e6:.2f} MB each: {ratio:.3f}",
        flush=True,
    )
    return same and abs(ratio - 1) <= SHARE


def write_texts(workspace: PicoWorkspace) -> None:
    """Write texts of different lengths to the index of the workspace, about eight batches."""
    index = workspace.texts()["index.tsv"]
    draw = random.Random(0)  # noqa: S311  texts, no secrets
    lines = ["id\tlanguage\tplace\tcountry\tquestion\tblurb"]
    for k in range(TEXTS):
        question, blurb = draw.choices(WORDS, k=8), draw.choices(WORDS, k=draw.randint(20, 90))
        lines.append(f"en-{k}\ten\tplace {k}\tland\t{' '.join(question)}\t{' '.join(blurb)}")
    index.write_text("\n".join([*lines, ""]), encoding="utf-8")


@contextmanager
def two_machines(rate: str) -> Iterator[None]:
    """Make two namespaces that are joined by a link, and remove them at the end.

    Args:
        rate: of the link in each direction.
    """
    first, second = NAMES
    commands = [f"ip netns add {name}" for name in NAMES]
    commands.append(
        f"ip link add {first} netns {first} type veth peer name {second} netns {second}"
    )
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        commands += [
            f"ip -n {name} address add {address}/24 dev {name}",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set {name} up",
            f"tc -n {name} qdisc add dev {name} root tbf rate {rate} burst 256kb latency 50ms",
        ]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                why = str(getattr(error, "stderr", "") or error).strip()
                sys.exit(
                    f"two_nodes.py: this machine lets nobody join two network namespaces: "
                    f"`{command}` says: {why}. Run it as root on Linux, with ip and tc installed."
                )
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def sent_bytes() -> list[int]:
    """Return how many bytes each machine has sent over the link."""
    found = []
    for name in NAMES:
        links = json.loads(done(["ip", "-n", name, "-s", "-j", "link", "show", "dev", name]))
        found.append(int(links[0]["stats64"]["tx"]["bytes"]))
    return found


def rotdistill(verb: str, recipe: Path) -> list[str]:
    """Return a command of rotdistill."""
    return [sys.executable, "-m", "rotdistill_core", verb, str(recipe)]


def run_on_both(recipe: Path, folder: Path) -> None:
    """Let torchrun start a process on each machine, and wait for both."""
    processes = []
    for number, name in enumerate(NAMES):
        launch = f"--nnodes 2 --node-rank {number} --nproc-per-node 1 --master-port {PORT}"
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
            *launch.split(),
            *("--master-addr", ADDRESSES[0], "-m", "rotdistill_core", "run", str(recipe)),
        ]
        processes.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env={**environment(), "GLOO_SOCKET_IFNAME": name},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        said, _ = process.communicate()
        if process.returncode:
            sys.exit(f"two_nodes.py: a process ended with {process.returncode}:\n{said}")


def environment() -> Mapping[str, str]:
    """Return the environment of all runs: the same number of threads gives the same bits."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def done(command: Sequence[str], folder: Path | None = None) -> str:
    """Carry out a command and return what it prints."""
    ended = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(
            f"two_nodes.py: {' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}"
        )
    return ended.stdout


def hashes(folder: Path) -> Mapping[str, str]:
    """Return the hash of each file of the runs in a folder, without ledgers and measured times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "ledger.jsonl":
            content = path.read_bytes()
            if path.name == "results.jsonl":
                lines = content.splitlines()
                content = b"\n".join(x for x in lines if json.loads(x)["metric"] != "seconds")
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main()
