"""GEPA: reflective prompt evolution with a Pareto front of candidates (Agrawal et al. 2025, arXiv 2507.19457).

The method is the `gepa` package's; this module is the bridge. gepa's engine is synchronous, so it runs in a thread of
its own, and everything that concerns the run (rollouts, reflection, the record) is handed to the trainer's loop.

One idea: gepa keeps no state that matters. Budget, cache and resume are the search's, not its own pickle's.
One trap: gepa swallows what a reflection model or a callback raises. So what must end a search passes through it as a
`BaseException` of our own, and the cause is raised again on this side.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden_plugins.algorithms.prompt.algorithm import PromptSearch
from leyden_plugins.algorithms.prompt.over import SearchOver
from leyden_plugins.algorithms.prompt.search import Prompts, Search, Tried
from leyden_plugins.algorithms.prompt.showing import calls_of, examples

MOST_IN_VAIN = 20
"""Reflection calls in a row whose proposals had been tried before; a model that says nothing new ends the search."""

Given = ParamSpec("Given")
Result = TypeVar("Result")
Texts = dict[Any, str]
"""A candidate as gepa sees it: a role's place -> its prompt. Places are numbers, for gepa goes through sets of them,
and sets of strings have another order in every process."""


@dataclass(frozen=True, kw_only=True)
class GEPA(PromptSearch):
    """Reflective prompt evolution, by the `gepa` package.

    Example:
        `leyden.Trainer(app, algorithm=GEPA(reflection=Reflection("gpt-5"), budget=300), tasks=tasks,
        prompts=["planner", "writer"], val_tasks=held_out).fit()`
    """

    proposals: int = 1
    """Candidates proposed at a time, from parents and minibatches of their own; the best of them is kept."""
    module_selector: Literal["round_robin", "all"] = "round_robin"
    """Which roles a proposal changes: one after the other, or all at once."""
    merge: bool = False
    """Also try to join two candidates that have improved different roles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proposals < 1:
            raise ConfigurationError(f"GEPA: proposals={self.proposals!r} must be at least 1")
        if self.module_selector not in ("round_robin", "all"):
            raise ConfigurationError(f"GEPA: module_selector={self.module_selector!r} must be 'round_robin' or 'all'")
        with extra("prompts"):
            import gepa  # noqa: F401  # a search must not find out late that it is missing

    async def improve(self, search: Search) -> None:
        """Run gepa's engine in a thread until it is ended from here."""
        bridge = Bridge(asyncio.get_running_loop())
        engine = asyncio.ensure_future(asyncio.to_thread(self._optimise, search, bridge))
        try:
            cause = await asyncio.shield(engine)
        except asyncio.CancelledError:
            bridge.end()
            await asyncio.wait([engine])
            raise
        if cause is not None:
            raise cause

    def _optimise(self, search: Search, bridge: Bridge) -> BaseException | None:
        """Run gepa's engine; return what ended it."""
        from gepa.api import optimize
        from gepa.strategies.proposal_sampling import IndependentSampling
        from gepa.strategies.proposal_selection import BestImprovement

        # Any: gepa's protocols say `str` where roles are numbers here.
        adapter: Any = Adapter(
            search, bridge, hints=self.hints, changes_all=self.module_selector == "all", merges=self.merge
        )
        try:
            optimize(
                seed_candidate=adapter.texts(search.seeds),
                trainset=list(search.split.feedback),
                valset=list(search.split.selection),
                adapter=adapter,
                reflection_strategy=adapter,
                skip_perfect_score=self.perfect is not None,
                perfect_score=1.0 if self.perfect is None else self.perfect,
                reflection_minibatch_size=min(self.minibatch, len(search.split.feedback)),
                module_selector=adapter.roles_to_change,
                use_merge=self.merge,
                stop_callbacks=adapter.is_idle,
                logger=Silent(),
                callbacks=[adapter],
                seed=self.seed,
                sampling_strategy=IndependentSampling(self.proposals) if self.proposals > 1 else None,
                selection_strategy=BestImprovement() if self.proposals > 1 else None,
            )
        except Ended as ended:
            return ended.cause
        return None


class Ended(BaseException):
    """Passes through gepa, which swallows every `Exception`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def heard(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make what gepa calls end the search when it fails, where gepa would log the failure and go on."""

    @functools.wraps(work)
    def call(*args: Given.args, **options: Given.kwargs) -> Result:
        try:
            return work(*args, **options)
        except Exception as error:
            raise Ended(error) from error

    return call


class Bridge:
    """From gepa's thread to the trainer's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ended = threading.Event()
        self._under_way: concurrent.futures.Future[Any] | None = None

    def call(self, work: Coroutine[object, object, Result]) -> Result:
        """Do work on the loop, and wait for it.

        Raises:
            Ended: whatever the work raised.
        """
        if self._ended.is_set():
            work.close()
            raise Ended(SearchOver("the run was cancelled"))
        future = self._under_way = asyncio.run_coroutine_threadsafe(work, self._loop)
        if self._ended.is_set():  # `end` came before it knew of this
            future.cancel()
        try:
            found: Result = future.result()
            return found
        except BaseException as error:
            raise Ended(error) from error

    def end(self) -> None:
        """Cancel what is under way and take no more work."""
        self._ended.set()
        if self._under_way is not None:
            self._under_way.cancel()


class Silent:
    """Takes gepa's log lines; the run has its own record."""

    def log(self, message: str) -> None:
        """Drop a line."""


class Adapter:
    """What gepa calls: evaluation, reflection, events. All of it runs in gepa's thread."""

    propose_new_texts = None
    """gepa proposes nothing at all where this attribute is missing."""

    def __init__(self, search: Search, bridge: Bridge, *, hints: str, changes_all: bool, merges: bool) -> None:
        self._search = search
        self._bridge = bridge
        self._hints = hints
        self._changes_all = changes_all
        self._merges = merges
        self._roles = list(search.seeds)
        self._numbers: dict[int, int] = {}
        """gepa's number of a candidate -> the search's."""
        self._left_before = self._calls_before = 0
        """Rollouts left, and reflection calls, when a rollout was last paid."""
        self._idle = 0
        """Iterations since then."""

    def texts(self, prompts: Prompts) -> Texts:
        """Return a candidate as gepa sees it."""
        return {place: prompts[role] for place, role in enumerate(self._roles)}

    def prompts(self, texts: Texts) -> dict[str, str]:
        """Return it as we do."""
        return {role: texts[place] for place, role in enumerate(self._roles)}

    # ---- evaluation --------------------------------------------------------------------------------------------

    @heard
    def evaluate(self, batch: list[int], candidate: Texts, capture_traces: bool = False) -> Any:
        """Try one candidate."""
        return self.batch_evaluate([(candidate, batch)])[0]

    @heard
    def batch_evaluate(self, items: Sequence[tuple[Texts, list[int]]], *, capture_traces: bool = True) -> list[Any]:
        """Try several candidates at once."""
        from gepa.core.adapter import EvaluationBatch

        found = self._bridge.call(self._search.evaluate([(self.prompts(texts), tasks) for texts, tasks in items]))
        least = min(one.score for tried in found for one in tried)
        if self._merges and least < 0:
            raise ConfigurationError(
                f"GEPA: merge=True needs rewards of at least 0, but a rollout has {least!r}: candidates are drawn for "
                "a merge by their scores; raise all rewards by a constant, or leave merge out"
            )
        return [
            EvaluationBatch(
                outputs=[one.records.rollout.rollout_id for one in tried],
                scores=[one.score for one in tried],
                trajectories=tried,
            )
            for tried in found
        ]

    # ---- reflection --------------------------------------------------------------------------------------------

    @heard
    def roles_to_change(self, state: Any, tried: list[Tried], scores: Any, index: int, candidate: Texts) -> list[int]:
        """Return the places of all roles that spoke, or of the next one in turn."""
        count = len(self._roles)
        spoke = [place for place, role in enumerate(self._roles) if any(calls_of(one.records, role) for one in tried)]
        if self._changes_all or not spoke:
            return spoke
        turns = state.named_predictor_id_to_update_next_for_program_candidate
        chosen = next(place for shift in range(count) if (place := (turns[index] + shift) % count) in spoke)
        turns[index] = (chosen + 1) % count
        return [chosen]

    @heard
    def make_reflective_dataset(self, candidate: Texts, batch: Any, places: list[int]) -> Mapping[Any, Any]:
        """Return what each of these roles did in the batch's rollouts."""
        records = [one.records for one in batch.trajectories]
        return {place: examples(records, self._roles[place]) for place in places}

    def reflect(self, candidate: Texts, dataset: Mapping[Any, Any], places: list[int]) -> Any:
        """Propose new texts for some roles of one candidate."""
        return self.reflect_many([(candidate, dataset, places)])[0]

    @heard
    def reflect_many(self, jobs: Sequence[tuple[Texts, Mapping[Any, Any], list[int]]]) -> list[Any]:
        """Propose new texts for several candidates at once; none where the model failed."""
        from gepa.proposer.reflective_mutation.reflection_lm import ReflectionProposal
        from gepa.strategies.instruction_proposal import InstructionProposalSignature as Signature

        wanted = [
            (number, place, self._question(place, candidate[place], dataset[place]))
            for number, (candidate, dataset, places) in enumerate(jobs)
            for place in places
            if dataset[place]
        ]
        answers = self._bridge.call(self._search.reflect([[question] for _, _, question in wanted]))
        proposals = [ReflectionProposal(new_texts={}) for _ in jobs]
        for (number, place, _), answer in zip(wanted, answers, strict=True):
            text = "" if answer is None else Signature.output_extractor(answer.strip())["new_instruction"]
            if text:
                proposals[number].new_texts[place] = text  # type: ignore[index]  # places stand for names, see Texts
        known = [one.prompts for one in self._search.record.candidates]
        for (candidate, _, _), proposal in zip(jobs, proposals, strict=True):
            if self.prompts({**candidate, **proposal.new_texts}) in known:
                proposal.new_texts.clear()  # gepa would enter it once more, with no end where nothing new is proposed
        return [(proposal, self) for proposal in proposals]

    def _question(self, place: int, text: str, dataset: Sequence[Mapping[str, str]]) -> dict[str, str]:
        from gepa.strategies.instruction_proposal import InstructionProposalSignature as Signature

        told = [
            f"The instructions are the system prompt of the role {self._roles[place]!r} of an application with the "
            f"roles {self._roles!r}; only this role's are to be rewritten."
            if len(self._roles) > 1
            else "",
            self._hints,
        ]
        rendered = Signature.prompt_renderer(
            {"current_instruction_doc": text, "dataset_with_feedback": dataset, "prompt_template": None}
        )
        return {"role": "user", "content": "\n\n".join([str(rendered), *(line for line in told if line)])}

    # ---- events ------------------------------------------------------------------------------------------------

    @heard
    def on_valset_evaluated(self, event: Mapping[str, Any]) -> None:
        """Enter a candidate that was compared."""
        parents = [self._numbers[parent] for parent in event["parent_ids"]]
        items = [(self.prompts(event["candidate"]), parents)]
        [added] = self._bridge.call(self._search.compare(items))  # whose rollouts are all there
        self._numbers[event["candidate_idx"]] = added.number

    def on_candidate_rejected(self, event: Mapping[str, Any]) -> None:
        """Count a proposal that was no better."""
        self._search.record.rejected += 1

    def is_idle(self, state: Any) -> bool:
        """Say whether gepa goes round without a new rollout: minibatches all perfect, nobody speaks, old proposals."""
        left, calls = self._search.left, self._search.reflector.spent.calls
        if left != self._left_before:
            self._left_before, self._calls_before, self._idle = left, calls, 0
        self._idle += 1
        return self._idle > 2 * len(self._search.split.feedback) + 10 or calls > self._calls_before + MOST_IN_VAIN
