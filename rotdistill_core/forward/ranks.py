"""The processes of one run: how many there are, who leads, and what they tell each other.

`torchrun` starts the same command in several processes and numbers them in the environment. All of
them carry out the same recipe and keep in step. Work on texts is dealt among them, batch by batch.
The first process leads: it alone writes files and the ledger, and decides what is found or made.

What processes add up are integers (`ExactSum`), and batches do not depend on how many processes
there are. So neither does any result: it has the same bits for one process and for many.

With one process nothing here does anything, and torch.distributed is not imported.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rotdistill_core.errors import CheckFailed, RotdistillError, SetupError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

START_SECONDS = 300.0
"""How long a process waits until all others have started."""
LIMIT_SECONDS = 3600.0
"""How long a process waits for the others in the middle of a step. The longest wait is for the
solution of one layer."""
LONGEST_PAUSE = 0.05
"""Seconds between two looks at what the leading process has done."""
LAST_WORDS_SECONDS = 20.0
"""How long a process lets the leading one say what is wrong before it ends itself."""
FAILED = "failed"
"""Where in the store a process leaves why it ends."""
ENDED = "ended"
"""Where the leading process says that it has said everything."""
GO_ON = "What was committed is kept; start the same command again to go on."


class ToldByLead(RotdistillError):
    """The run ends in all processes, and the leading one says why."""

    def __init__(self, error: str, exit_code: int) -> None:
        super().__init__(error)
        self.exit_code = exit_code


class Ranks:
    """One process alone: it leads, it does everything itself, and nothing is sent."""

    number = 0
    """The number of this process."""
    count = 1
    """Number of processes."""
    launch = ""
    """Names the launch that this process belongs to; empty if no launcher may restart it."""

    @property
    def leads(self) -> bool:
        """Whether this process writes, decides and reports."""
        return self.number == 0

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Return this process' share of items that are dealt by index."""
        return [*items[self.number :: self.count]]

    def lead(self, work: Callable[[], Result]) -> Result:
        """Let the leading process alone do something; return its result in all processes.

        The result has to be one that `pickle` takes.

        Raises:
            CheckFailed: the work raised it, in all processes.
            ToldByLead: the work raised something else, in the processes that do not lead.
        """
        return work()

    def lead_alone(self, work: Callable[[], Result], others: Result) -> Result:
        """Let the leading process alone do something that it alone needs the result of.

        The other processes wait, and return `others`. Nothing is sent, so the result may be one
        that `pickle` does not take.

        Raises:
            CheckFailed: the work raised it, in all processes.
            ToldByLead: the work raised something else, in the processes that do not lead.
        """
        results = [others]

        def keep() -> None:
            results[0] = work()

        self.lead(keep)
        return results[0]

    def add_up(self, values: Tensor) -> None:
        """Replace a tensor by the sum of those of all processes, in all of them."""

    def collect(
        self,
        part: Tensor,
        lengths: Sequence[int],  # noqa: ARG002  with one process it is known
    ) -> list[Tensor] | None:
        """Return the rows of all processes, one tensor each, on the host of the leading one.

        Args:
            part: rows of this process `[n, ...]`.
            lengths: how many rows each process has.

        Returns:
            None in the processes that do not lead.
        """
        return [part.cpu()]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Carry out a run; if this process fails, tell the others, so that they do not wait.

        At the end each process waits for the others.
        """
        yield


ALONE = Ranks()
"""One process."""


@dataclass(frozen=True)
class Numbering:
    """What a launcher says about a process in its environment."""

    number: int
    count: int
    local: int
    """Number of the process on its machine."""
    launch: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Numbering | None:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; None without a launcher.

        Raises:
            SetupError: some of them are missing, or are no such numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [environment.get(name, "") for name in names]
        if not values[0] or not values[1]:
            return None
        if not values[2]:
            values[2] = "0" if values[1] == "1" else ""
        numbers = [int(value) if value.isdigit() else -1 for value in values]
        rank, world, local = numbers
        if min(numbers) < 0 or not rank < world:
            said = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
            raise SetupError(
                f"the environment numbers this process {said}; RANK and LOCAL_RANK have to be "
                "numbers below WORLD_SIZE. Start several processes with torchrun, or remove these "
                "variables to run in one."
            )
        return cls(rank, world, local, launch_name(environment))


def launch_name(environment: Mapping[str, str]) -> str:
    """Return a name that the restarts of one launch share, and no other launch has."""
    job = environment.get("TORCHELASTIC_RUN_ID", "")
    if not job:
        return ""
    if job == "none":  # what torchrun says if it was given no name
        job = f"{socket.gethostname()}:{os.getppid()}:{environment.get('MASTER_PORT')}"
    return hashlib.sha256(job.encode()).hexdigest()[:16]


def start_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Find the other processes of this run; with one process do nothing.

    Raises:
        SetupError: the environment does not fit together, the others cannot be reached, or this
            machine has fewer GPUs than processes.
    """
    found = Numbering.of(environment)
    if found is None:
        return ALONE
    if found.count == 1:
        alone = Ranks()
        alone.launch = found.launch
        return alone
    return Processes(found)


class Processes(Ranks):
    """One of several processes, started by a launcher.

    Raises:
        SetupError: the others cannot be reached, or this machine has fewer GPUs than processes.
    """

    def __init__(self, numbering: Numbering) -> None:
        self.number = numbering.number
        self.count = numbering.count
        self.launch = numbering.launch
        self._turns = 0
        """How often the leading process has been waited for."""
        self._has_nccl = _take_gpu(numbering.local)
        # One process does not need it.
        import torch.distributed.distributed_c10d as dist  # noqa: PLC0415
        from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

        self._dist = dist
        try:
            self._store = self._meet(rendezvous)
        except (RuntimeError, ValueError) as error:
            raise SetupError(
                f"{self}: the others cannot be reached ({_first_line(error)}). Start all of them "
                "with torchrun, on machines that reach each other."
            ) from error
        if self.leads:
            atexit.register(self._say_goodbye)

    def __str__(self) -> str:
        """Return which process this is, in words."""
        return f"process {self.number} of {self.count}"

    def _meet(self, rendezvous: Callable[..., Iterator[tuple[Store, int, int]]]) -> Store:
        """Wait for all processes; return the store through which they talk."""
        start, limit = timedelta(seconds=START_SECONDS), timedelta(seconds=LIMIT_SECONDS)
        # torchrun keeps its store when it restarts processes, with what the dead ones have said.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, world = next(rendezvous("env://", timeout=start))
        self._dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._has_nccl else "gloo",
            store=self._dist.PrefixStore(f"group {attempt}", store),
            rank=rank,
            world_size=world,
            timeout=limit,
        )
        return self._dist.PrefixStore(f"rotdistill {attempt}", store)

    def lead(self, work: Callable[[], Result]) -> Result:
        """See `Ranks.lead`."""
        self._turns += 1
        key = f"turn {self._turns}"
        if not self.leads:
            return cast("Result", self._answer_of_lead(key))
        try:
            result = work()
        except BaseException as error:
            self._tell(key, _Raised.of(error))
            raise
        self._tell(key, _Returned(result))
        return result

    def _heard(self, key: str) -> object:
        return pickle.loads(self._store.get(key))  # noqa: S301  a process of this run sent it

    def _tell(self, key: str, answer: object) -> None:
        # A store of torch takes bytes and returns them; its annotation says str.
        self._store.set(key, cast("str", pickle.dumps(answer)))

    def _answer_of_lead(self, key: str) -> object:
        """Wait until the leading process has done something; return its result.

        There is no limit: some work takes hours. The launcher ends this process if the leading one
        dies.
        """
        pause = 0.001
        try:
            while not self._store.check([key]):
                if not self._store.check([FAILED]):
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                elif not self._store.check([key]):  # it is not what has failed
                    self._require_all()
            answer = self._heard(key)
        except RuntimeError as error:
            raise self._lost() from error
        if isinstance(answer, _Raised):
            raise answer.again()
        return cast("_Returned", answer).value

    def add_up(self, values: Tensor) -> None:
        """See `Ranks.add_up`."""
        with self._in_step():
            if values.device.type == "cpu" or self._has_nccl:
                self._dist.all_reduce(values)
            else:
                on_host = values.cpu()
                self._dist.all_reduce(on_host)
                values.copy_(on_host)

    def collect(self, part: Tensor, lengths: Sequence[int]) -> list[Tensor] | None:
        """See `Ranks.collect`."""
        part = part.cpu().contiguous()
        with self._in_step():
            if not self.leads:
                if len(part):
                    self._dist.send(part, 0)
                return None
            parts = [part]
            for number in range(1, self.count):
                received = part.new_empty(lengths[number], *part.shape[1:])
                if lengths[number]:
                    self._dist.recv(received, number)
                parts.append(received)
            return parts

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Ranks.together`."""
        try:
            yield
            with self._in_step():
                self._dist.barrier()
        except ToldByLead:
            self._wait_for_last_words()
            raise
        except PeerLost:
            raise  # all others will see it, too
        except BaseException as error:
            self._say_failed(error)
            raise
        self._dist.destroy_process_group()

    def _say_failed(self, error: BaseException) -> None:
        try:
            self._tell(FAILED, _Raised.of(error, self.number))
        except RuntimeError:
            return  # nobody is left to hear it

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Say in one sentence that another process is lost, if it is."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost() from error

    def _require_all(self) -> None:
        """Raise if another process has said that it ends."""
        if self._store.check([FAILED]):
            failed = cast("_Raised", self._heard(FAILED))
            if failed.number == 0:
                raise ToldByLead(failed.text, failed.exit_code)
            raise PeerLost(f"{self}: process {failed.number} ended: {failed.text} {GO_ON}")

    def _lost(self) -> RotdistillError:
        """Return the error to raise when another process does not answer."""
        try:
            self._require_all()
        except (PeerLost, ToldByLead) as known:
            return known
        except RuntimeError:
            pass  # the store is gone with the process that held it
        return PeerLost(
            f"{self}: another process of this run has ended or does not answer, so this one ends "
            f"too. {GO_ON}"
        )

    def _wait_for_last_words(self) -> None:
        """Let the leading process say what is wrong: the launcher ends all when one has ended."""
        until = time.monotonic() + LAST_WORDS_SECONDS
        try:
            while time.monotonic() < until and not self._store.check([ENDED]):
                time.sleep(LONGEST_PAUSE)
        except RuntimeError:
            return  # the store is gone, and the leading process with it

    def _say_goodbye(self) -> None:
        try:
            self._store.set(ENDED, "1")
        except RuntimeError:
            return  # nobody is left to hear it


class PeerLost(SetupError):
    """Another process of the run has ended, so this one cannot go on."""


@dataclass(frozen=True)
class _Returned:
    """What the leading process' work returned."""

    value: Any


@dataclass(frozen=True)
class _Raised:
    """What it raised."""

    text: str
    is_check: bool
    exit_code: int
    number: int
    """Of the process that raised it."""

    @classmethod
    def of(cls, error: BaseException, number: int = 0) -> _Raised:
        code = int(getattr(error, "exit_code", 1))
        return cls(str(error), type(error) is CheckFailed, code, number)

    def again(self) -> RotdistillError:
        """Return the error for the processes that do not lead."""
        return CheckFailed(self.text) if self.is_check else ToldByLead(self.text, self.exit_code)


def _take_gpu(local: int) -> bool:
    """Make "cuda" mean a GPU of this process' own; return whether there is one.

    Raises:
        SetupError: this machine has GPUs, and fewer than processes.
    """
    import torch  # noqa: PLC0415  a process that is alone decides without

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return False
    if local >= gpus:
        raise SetupError(
            f"process {local} of this machine has no GPU of its own; torch sees {gpus}. Start as "
            f"many processes as there are GPUs (torchrun --nproc-per-node {gpus}), or hide the "
            "GPUs from all (CUDA_VISIBLE_DEVICES=)."
        )
    torch.cuda.set_device(local)
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
