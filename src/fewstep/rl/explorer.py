"""A learner in environments: it samples, adapts to what it sampled, and samples again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.episodes import Episodes, numbered_generator
from fewstep.errors import DivergenceError, FewstepError, InputError
from fewstep.functional import Tensors
from fewstep.learner import Learner
from fewstep.progress import narrate
from fewstep.rl.divergence import parameters_of
from fewstep.rl.environments import Environment
from fewstep.rl.experience import Experience, Trajectories
from fewstep.rl.policies import Policy
from fewstep.rl.rollout import learned_from, rollout, shape_of
from fewstep.task import Point, Task

SOONEST = 0.01  # seconds: a step of navigation takes a few hundredths of that


@dataclass(frozen=True, kw_only=True)
class EnvironmentEpisodes(Episodes):
    """Batches of tasks of an environment, each with a seed for all that happens in it.

    support and query : (task [K, ...], seed [K]), which an `Explorer` takes
    """

    environment: Environment

    def draw(self, generator: torch.Generator) -> Task:
        goals = self.environment.sample_tasks(self.tasks, generator)
        if not isinstance(goals, Tensor) or goals.shape[:1] != (self.tasks,):
            raise InputError(f"sample_tasks({self.tasks}, generator) must give a tensor [{self.tasks}, ...] of the "
                             f"environment, but {shape_of(goals)} came")  # fmt: skip
        batch = goals.to(self.device), torch.randint(2**60, (self.tasks,), generator=generator)
        return Task(support=batch, query=batch)


class ExploringError(InputError):
    """The environment failed. failed : the places of such tasks in the batch"""

    def __init__(self, failed: Sequence[int], goals: Tensor, seeds: Tensor, step: int, reason: str,
                 all_known: bool = True) -> None:  # fmt: skip
        first = ", ".join(f"task {goals[place].tolist()} with seed {int(seeds[place])}" for place in failed[:3])
        count = f"{len(failed)}{'' if all_known else ' or more'}"
        what = f"{count} of {len(goals)} tasks of the environment failed after {step} inner steps ({reason})"
        super().__init__(f"{what}: {first}; mend it, end such trajectories, or leave such tasks out (--skip-failures)")
        self.failed = list(failed)


def _failing(live: Callable[[slice], Any], count: int, one_will_do: bool) -> list[int]:
    """The tasks that fail alone, too, or the first of them."""
    found = []
    for task in range(count):
        try:
            live(slice(task, task + 1))
        except Exception:
            found.append(task)
            if one_will_do:
                break
    return found


@torch.no_grad()
def one_action(policy: Policy, observations: int) -> tuple[Tensor, Tensor]:
    """The policy's outputs [1, p] for an observation of zeros, and an action [1, ...] out of them."""
    about = next(policy.parameters())
    outputs = policy(about.new_zeros(1, observations))
    return outputs, policy.act(outputs, policy.noise((1,), torch.Generator()).to(about))


def check_fit(policy: Policy, world: Environment) -> None:
    """Raise `InputError` unless the policy sees what the world shows, and acts as the world is acted in."""
    made = "build it for that world, as fewstep.rl.policy_of(world) does"
    if getattr(policy, "observations", world.observations) != world.observations:
        raise InputError(
            f"the policy takes observations of {policy.observations} numbers, but the world gives "
            f"{world.observations}; {made}"
        )
    action = one_action(policy, world.observations)[1]
    discrete, numbers = not action.is_floating_point(), list(action.shape[1:])
    fits = (discrete, numbers) == (world.discrete, [] if world.discrete else [world.actions])
    if not fits or policy.actions not in (None, world.actions):
        wanted = f"one of {world.actions}" if world.discrete else f"{world.actions} numbers"
        count = "some" if policy.actions is None else policy.actions
        came = f"one of {count}" if discrete and not numbers else f"numbers of shape {numbers}"
        raise InputError(f"the policy's actions are {came}, but the world takes {wanted}; {made}")


class Explorer:
    """Gives a learner the experience that it adapts to and is judged by.

    learner : of a `Policy`, with a surrogate as its loss and `stream=True`: the support set of each inner step is what
        the policy lived through with the parameters of that moment
    trajectories : of each task, before each step and after the last
    discount, decay : gamma and lambda of the advantages
    skip_failures : `lived` leaves tasks out in which the environment raises, gives NaN or takes too long; else they are
        an error
    limit : seconds that the environment may take for a step of all trajectories; None waits for ever
    """

    def __init__(self, learner: Learner, environment: Environment, *, trajectories: int = 20, discount: float = 0.99,
                 decay: float = 1.0, skip_failures: bool = False, limit: float | None = None) -> None:  # fmt: skip
        if not isinstance(learner.model, Policy):
            raise InputError(f"the learner's model must be a policy, but a {type(learner.model).__name__} came")
        if not learner.stream:
            raise InputError("each inner step has experience of its own: build the learner with stream=True")
        if trajectories < 1:
            raise InputError(f"there must be at least 1 trajectory of each task, but {trajectories} came")
        if environment.horizon < 1:
            raise InputError(f"the environment's horizon must be at least 1, but it is {environment.horizon}")
        if limit is not None and not SOONEST <= limit < 1e9:
            raise InputError(f"the limit of a step must be at least {SOONEST} seconds and finite, but {limit} came")
        for name, value in (("discount", discount), ("decay", decay)):
            if not 0 <= value <= 1:
                raise InputError(f"the {name} must be from 0 to 1, but {value} came")
        check_fit(learner.model, environment)
        self.learner, self.policy, self.environment = learner, learner.model, environment
        self.trajectories, self.discount, self.decay = trajectories, discount, decay
        self.skip_failures, self.limit = skip_failures, limit
        self.left_out, self._steps, self._seconds = 0, 0, 0.0

    @property
    def about(self) -> dict[str, float]:
        """What training writes down of each iteration, beside the loss: of this process."""
        skipped = {"tasks_left_out": self.left_out} if self.skip_failures else {}
        return {"environment_steps_per_s": round(self.rate), **skipped}

    @property
    def rate(self) -> float:
        """Environment steps per second so far, of all trajectories together, while nothing but sampling went on."""
        return self._steps / self._seconds if self._seconds else 0.0

    def explore(self, tasks: Task, steps: int | None = None) -> Task:
        """Experience before each inner step (support, a stream) and after the last one (query): a batch of tasks."""
        return self.task_of(list(self.walk(tasks, steps)))

    def task_of(self, walk: Sequence[Trajectories]) -> Task:
        """The same from what was lived through."""
        *support, query = [self.learned_from(lived) for lived in walk]
        stream = support or [query]  # without inner steps nothing of it is used
        return Task(Experience(*[torch.stack(part, 1) for part in zip(*stream, strict=True)]), query)

    def lived(self, tasks: Task, steps: int | None = None) -> tuple[Task, list[Trajectories]]:
        """What was lived through at the start and after each inner step, and the tasks: all that did not fail.

        Where every task of this process fails, that is an error.
        """
        while True:
            try:
                return tasks, list(self.walk(tasks, steps))
            except ExploringError as error:
                if not self.skip_failures or len(error.failed) == tasks.size:
                    raise
                narrate(f"left out: {error}")
                self.left_out += len(error.failed)
                others = [task for task in range(tasks.size) if task not in error.failed]
                tasks = tasks.select(torch.tensor(others))

    @torch.no_grad()
    def walk(self, tasks: Task, steps: int | None = None) -> Iterator[Trajectories]:
        """What was lived through at the start and after each inner step."""
        steps = self.learner.steps if steps is None else steps
        support = self._empty(len(tasks.support[1]), max(steps, 1))
        with self.learner.checked(Task(support, Experience(*[part[:, 0] for part in support]))):
            for step, theta in enumerate(self.learner.inner_loop(support, steps)):
                lived = self._live(theta, tasks, step)
                if step < steps:  # the next step of the loop reads what is written here
                    for stream, part in zip(support, self.learned_from(lived), strict=True):
                        stream[:, step] = part
                yield lived

    def learned_from(self, lived: Trajectories) -> Experience:
        """What the learner is given of it."""
        return learned_from(lived, self.discount, self.decay)

    def path(self, tasks: Task, steps: int, at: Collection[int] | None = None) -> list[Point]:
        """The return after each of `steps` inner steps, with its sign turned, as a loss [K]: of what did not fail."""
        points = [Point(-lived.returns, None) for lived in self.lived(tasks, steps)[1]]
        return points if at is None else [points[step] for step in sorted(at)]

    def modules(self) -> Iterator[nn.Module]:
        return self.learner.modules()

    def eval(self) -> Any:
        return self.learner.eval()

    def _live(self, theta: Tensors, tasks: Task, step: int) -> Trajectories:
        goals, seeds = tasks.support
        stacked = parameters_of(self.learner, theta, step, len(goals))

        def live(chosen: slice) -> Trajectories:
            generators = [numbered_generator(int(seed), step) for seed in seeds[chosen]]
            own = {name: value[chosen] for name, value in stacked.items()}
            return rollout(self.policy, own, self.environment, goals[chosen], self.trajectories, generators, self.limit)

        started = time.perf_counter()
        try:
            lived = live(slice(None))
        except FewstepError:
            raise
        except Exception as error:  # an environment fails in any way
            reason = f"{type(error).__name__}: {str(error).strip() or 'without a word'}".splitlines()[0]
            slow = isinstance(error, TimeoutError) and not self.skip_failures  # no need to wait for each of them
            if failed := _failing(live, len(goals), slow):
                raise ExploringError(failed, goals, seeds, step, reason, all_known=not slow) from error
            told = InputError(
                f"the environment failed after {step} inner steps with all {len(goals)} tasks together and with "
                f"none alone ({reason}); take fewer tasks at a time, allow a step more "
                "time (--step-limit), or try again"
            )
            if not self.skip_failures:
                raise told from error
            narrate(f"once more, for {told}")
            try:
                lived = live(slice(None))
            except Exception:
                raise told from error
        self._seconds += time.perf_counter() - started
        self._steps += int(lived.mask.sum())  # what follows an end is not stepped through
        acted = lived.outputs.isfinite().all(-1) | ~lived.observations.isfinite().all(-1)
        if not acted.all():
            raise DivergenceError(
                f"the policy's outputs are not finite after {step} inner steps; lower the inner rate, or clip it"
            )
        for name, part in (("observations", lived.observations), ("rewards", lived.rewards)):
            wrong = ~part.isfinite().reshape(len(goals), -1).all(1)
            if wrong.any():
                failed = wrong.nonzero()[:, 0].tolist()
                raise ExploringError(failed, goals, seeds, step, f"its {name} hold NaN or infinity")
        return lived

    def _empty(self, tasks: int, steps: int) -> Experience:
        """Where the walk writes what it lives through."""
        about = next(self.policy.parameters())
        world, shape = self.environment, (tasks, steps, self.trajectories, self.environment.horizon)
        outputs, action = one_action(self.policy, world.observations)
        return Experience(
            about.new_zeros(*shape, world.observations),
            torch.zeros(*shape, *action.shape[1:], dtype=action.dtype, device=action.device),
            about.new_zeros(shape),
            about.new_zeros(shape),
            about.new_zeros(*shape, outputs.shape[-1]),
            torch.zeros(shape, dtype=torch.bool, device=about.device),
            about.new_zeros(shape[:-1]),
        )
