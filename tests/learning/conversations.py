"""Random batches as agents make them, for properties of layouts."""

from hypothesis import strategies as st

from leyden.interfaces import Transition
from tests.learning.builders import transition


@st.composite
def conversations(draw: st.DrawFn) -> list[Transition]:
    """Draw groups of rollouts: interleaved roles, branches, retries that say the same, and new beginnings."""
    found: list[Transition] = []
    some = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    for group in range(draw(st.integers(1, 2))):
        opening = draw(some)
        for number in range(draw(st.integers(1, 3))):
            contexts = [opening]
            for turn in range(draw(st.integers(1, 4))):
                prompt = draw(st.sampled_from(contexts)) + draw(st.just([]) | some)
                answer = draw(some)
                contexts.append(prompt + answer)
                found.append(
                    transition(
                        prompt=prompt,
                        tokens=answer,
                        logprobs=[draw(st.floats(-4, -1)) for _ in answer],
                        rollout_id=f"r{group}-{number}",
                        group_id=f"g{group}",
                        role=draw(st.sampled_from(["writer", "rewriter"])),
                        span_id=f"s{group}-{number}-{turn}",
                        temperature=draw(st.sampled_from([1.0, 0.7])),
                        advantage=draw(st.floats(0.5, 2)) * draw(st.sampled_from([1, -1])),
                    )
                )
    return found
