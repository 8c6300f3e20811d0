"""Many processes, called ranks, on one training: each takes a share of the tasks, and they average their gradients.

The vector of one all-reduce a step is all the traffic. Nothing wraps the model: DDP and FSDP break second derivatives.
Every function here is for a single process too, where it does nothing; with several, all ranks have to call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from hashlib import blake2b
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from fewstep.data.episodes import numbered_generator
from fewstep.errors import FewstepError, InputError
from fewstep.task import Task

T = TypeVar("T")

# While the first rank trains a classifier of all classes, the others wait; one that dies is noticed at once.
WAIT = timedelta(days=1)
_LAUNCHER = os.getppid()


def ranks() -> int:
    """How many processes work together: those of PyTorch's default process group, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun started, if it did: gloo for tensors on the CPU, NCCL for those on CUDA.

    On CUDA the device "cuda" is then the GPU with the number of the rank on its machine. Where ranks end by an
    exception, the first to end raises it, and the others, whom it took along, leave with its kind of exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks() > 1:
        yield
        return
    on_cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if on_cuda and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    with _talking():
        store, number, count = next(rendezvous("env://"))
        store = _of_this_start(store, number, count)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=WAIT)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        ended = 1 + rank()
        with suppress(RuntimeError):  # the launcher, who keeps the store, may be gone
            ended = store.add("fewstep/ended", 1)
        if ended > 1:
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        raise  # without a farewell, which could wait for a rank that is gone
    dist.destroy_process_group()


def share(tasks: Task) -> Task:
    """This rank's part of a batch of tasks that every rank has drawn alike. Parts differ by one task at most.

    The first rank, which plans for all, has no less than any other.

    >>> x = torch.arange(3.0).reshape(3, 1, 1)
    >>> share(Task((x, x), (x, x))).size  # a single process takes all
    3
    """
    if ranks() == 1:
        return tasks
    count = tasks.size
    _check_tasks(count, ranks())
    start, end = (-(-number * count // ranks()) for number in (rank(), rank() + 1))
    return tasks.select(slice(start, end))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], tasks: int, *also: Tensor | float) -> list[Tensor]:
    """Replace each gradient by its mean over the tasks of all ranks, and return the same mean of the numbers `also`.

    tasks : how many tasks this rank's gradients (and numbers) are the mean over, `share(...).size`
    Summed in float32 or wider. A parameter without a gradient on any rank stays without one.
    """
    numbers = [torch.as_tensor(number).detach() for number in also]
    if ranks() == 1:
        return numbers
    trained = [value for value in parameters if value.requires_grad]
    has_one = torch.tensor([value.grad is not None for value in trained])
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained]
    *means, has_one = averaged([*gradients, *numbers, has_one], tasks)
    for value, mean, one in zip(trained, means, has_one.tolist(), strict=False):
        value.grad = mean.to(value.dtype) if one else None
    return means[len(trained) :]


def averaged(values: Sequence[Tensor], tasks: int) -> list[Tensor]:
    """The mean of each value over the tasks of all ranks, where this rank's is the mean over so many `tasks`.

    Summed in float32 or wider, on the device of the first.
    """
    if ranks() == 1:
        return list(values)
    dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    parts = [*values, torch.ones(())]
    vector = tasks * torch.cat([part.detach().to(values[0].device, dtype).flatten() for part in parts])
    with _talking():
        dist.all_reduce(vector)
    *means, _ = torch.split(vector / vector[-1], [part.numel() for part in parts])  # by the tasks of all ranks
    return [mean.view_as(value) for mean, value in zip(means, values, strict=True)]


def on_all_ranks(function: Callable[[int], Tensor], count: int) -> list[Tensor]:
    """`[function(0), ..., function(count - 1)]`: the calls are shared out one by one, and every rank gets the list."""
    if ranks() == 1:
        return [function(index) for index in range(count)]
    parts = gathered([function(index).cpu() for index in range(rank(), count, ranks())])
    return [parts[index % ranks()][index // ranks()] for index in range(count)]


def gathered(value: T) -> list[T]:
    """The values of all ranks, in order; tensors in them have to be on the CPU."""
    if ranks() == 1:
        return [value]
    values: list[T | None] = [None] * ranks()
    with _talking():
        dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first rank, for every rank; tensors in it have to be on the CPU."""
    if ranks() == 1:
        return make()
    box = [make() if is_first() else None]
    with _talking():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


@torch.no_grad()
def start_alike(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of the first, and random numbers (for dropout) of its own."""
    if ranks() == 1:
        return
    for value in module.state_dict().values():
        same = value.contiguous()
        with _talking():
            dist.broadcast(same, src=0)
        value.copy_(same)
    own_random_numbers()


def own_random_numbers() -> None:
    """Give each rank but the first a stream of its own, which follows from the seed that all had."""
    if not is_first():
        torch.manual_seed(numbered_generator(torch.initial_seed(), rank()).initial_seed())


def deserted() -> bool:
    """Whether the launcher has died, who would have to end this rank with the others."""
    return ranks() > 1 and os.getppid() != _LAUNCHER


def check_processes(count: int, tasks: int, device: str) -> None:
    """Raise `InputError` where `count` processes on this machine cannot share `tasks` tasks a step on `device`."""
    if count < 1:
        raise InputError(f"the number of processes must be at least 1, but {count} came")
    if count == 1:
        return
    _check_tasks(tasks, count)
    if device not in ("cpu", "cuda"):
        raise InputError(f"several processes compute on the device cpu, or cuda with a GPU for each, not on {device}")
    if device == "cuda" and count > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"{count} processes need a GPU each, but there are {gpus}; start {gpus}, or use the CPU")


def _check_tasks(tasks: int, count: int) -> None:
    if tasks < count:
        raise InputError(f"{tasks} tasks a step are too few for {count} processes; start {tasks}, or take more tasks")


def processes_here() -> int:
    """How many of the ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks() > 1 else 1


def cores() -> int:
    """How many processor cores a process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_this_start(store: Any, number: int, count: int) -> Any:
    """A part of the store that ranks of earlier starts, since dead, have not written to.

    torchrun keeps its store over restarts (pytorch/pytorch#135712), and counts them on each machine by itself. So each
    rank writes down a new name, and all wait until they have seen the same names.
    """
    store.set(f"fewstep/name/{number}", uuid4().hex)
    while True:
        names = [store.get(f"fewstep/name/{other}") for other in range(count)]
        seen = blake2b(b"".join(names), digest_size=16).hexdigest()
        store.set(f"fewstep/seen/{number}", seen)
        if all(store.get(f"fewstep/seen/{other}").decode() == seen for other in range(count)):
            return dist.PrefixStore(seen, store)  # type: ignore[attr-defined]
        time.sleep(0.01)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _talking() -> Iterator[None]:
    """A message to the other ranks fails where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FewstepError(f"process {rank()} cannot reach the others, one may have been killed ({reason})") from error
