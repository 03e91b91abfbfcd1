"""Store token ids once, however often later prompts repeat them.

One idea: the prompt of a completion is kept as (an earlier completion of the same attempt, which choice of it,
how many tokens are shared, the tokens that follow), so a rollout of T turns costs O(T) and a prompt that broke
the prefix costs what changed. One trap: log-probabilities are kept as float32, which is what engines compute;
a value that float32 cannot hold comes back rounded (relative error below 6e-8).
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from leyden.errors import StoreError
from leyden.spans import Completion

_BYTES_PER_TOKEN = 4
_SWAPPED = sys.byteorder == "big"  # blobs are little-endian, so that a store can be read on another machine


class PackedChoice(msgspec.Struct, frozen=True, array_like=True):
    """The numbers of one choice."""

    token_ids: bytes
    """int32, little-endian."""
    logprobs: bytes
    """float32, little-endian, aligned with `token_ids`."""


class PackedTokens(msgspec.Struct, frozen=True, array_like=True):
    """The numbers of one completion, relative to an earlier one."""

    base: tuple[str, int] | None
    """Key (span id, HTTP attempt) of the completion whose tokens the prompt shares; `None` shares none."""
    base_choice: int
    """Position of the choice of `base` that the prompt goes on after; -1 when the base has no choice."""
    shared: int
    """How many tokens of (the base's prompt + that choice) begin this prompt."""
    prompt: bytes
    """The prompt's tokens after the shared ones, int32."""
    choices: list[PackedChoice]


class PromptReader:
    """Rebuilds completions from rows that come in store order, looking up a base it has not seen.

    Args:
        fetch: returns the packed tokens of a key (rollout id, attempt, completion key).
    """

    def __init__(self, fetch: Callable[[str, int, str], PackedTokens]) -> None:
        self._fetch = fetch
        self._prompts: dict[tuple[str, int, str], array[int]] = {}
        self._packed: dict[tuple[str, int, str], PackedTokens] = {}

    def fill(self, completion: Completion, packed: PackedTokens) -> Completion:
        """Put the numbers back into a freshly decoded completion."""
        key = completion_key(completion.span_id, completion.http_attempt)
        where = (completion.rollout_id, completion.attempt, key)
        self._packed[where] = packed
        prompt = self._prompt(*where).tolist()
        choices = [
            msgspec.structs.replace(choice, token_ids=_ints(c.token_ids).tolist(), logprobs=_floats(c.logprobs))
            for choice, c in zip(completion.choices, packed.choices, strict=True)
        ]
        msgspec.structs.force_setattr(completion, "prompt_token_ids", prompt)
        msgspec.structs.force_setattr(completion, "choices", choices)
        return completion

    def _prompt(self, rollout_id: str, attempt: int, key: str) -> array[int]:
        # A loop, not recursion: the chain is as long as the rollout has turns.
        chain: list[tuple[str, int, str]] = []
        where: tuple[str, int, str] | None = (rollout_id, attempt, key)
        while where is not None and where not in self._prompts:
            chain.append(where)
            packed = self._packed_of(where)
            where = (rollout_id, attempt, completion_key(*packed.base)) if packed.base else None
        for where in reversed(chain):
            packed = self._packed[where]
            prompt: array[int] = array("i")
            if packed.base:
                base = (rollout_id, attempt, completion_key(*packed.base))
                path = self._prompts[base]
                if packed.shared > len(path):
                    path = path + _ints(self._packed[base].choices[packed.base_choice].token_ids)
                prompt = path[: packed.shared]
            prompt.extend(_ints(packed.prompt))
            self._prompts[where] = prompt
        return self._prompts[(rollout_id, attempt, key)]

    def _packed_of(self, where: tuple[str, int, str]) -> PackedTokens:
        if where not in self._packed:
            self._packed[where] = self._fetch(*where)
        return self._packed[where]


@dataclass(frozen=True, slots=True)
class _Path:
    """The tokens a later prompt may begin with: a prompt and one answer to it."""

    key: tuple[str, int]
    choice: int
    tokens: bytes


class PromptIndex:
    """Knows the tokens of running attempts and packs each new prompt against them. Not thread-safe.

    Args:
        limit_bytes: how much to remember; beyond it the attempt that was quiet longest is forgotten, whose next
            prompt is then stored whole.
    """

    def __init__(self, limit_bytes: int = 64 * 2**20) -> None:
        self._paths: OrderedDict[tuple[str, int], list[_Path]] = OrderedDict()
        self._limit_bytes = limit_bytes
        self._bytes = 0

    def pack(self, rollout_id: str, attempt: int, key: str, numbers: PackedTokens) -> PackedTokens:
        """Return a completion's numbers with its prompt shared as far as possible, and remember its tokens."""
        where = (rollout_id, attempt)
        paths = self._paths.setdefault(where, [])
        self._paths.move_to_end(where)
        best, shared = _longest_shared(paths, numbers.prompt)
        if best is not None:
            packed = PackedTokens(
                best.key, best.choice, shared // _BYTES_PER_TOKEN, numbers.prompt[shared:], numbers.choices
            )
            if shared == len(best.tokens):
                # Whatever shares with the shorter path shares as much with this prompt.
                paths.remove(best)
                self._bytes -= len(best.tokens)
        else:
            packed = numbers
        self._remember(paths, split_completion_key(key), numbers)
        while self._bytes > self._limit_bytes and len(self._paths) > 1:
            self.forget(*next(iter(self._paths)))
        return packed

    def forget(self, rollout_id: str, attempt: int) -> None:
        """Drop a finished attempt."""
        for path in self._paths.pop((rollout_id, attempt), ()):
            self._bytes -= len(path.tokens)

    def _remember(self, paths: list[_Path], key: tuple[str, int], numbers: PackedTokens) -> None:
        new = [_Path(key, i, numbers.prompt + c.token_ids) for i, c in enumerate(numbers.choices)]
        for path in new or [_Path(key, -1, numbers.prompt)]:
            paths.append(path)
            self._bytes += len(path.tokens)


def completion_key(span_id: str, http_attempt: int) -> str:
    """Return the key of a completion's row."""
    return f"c{span_id}/{http_attempt}"


def split_completion_key(key: str) -> tuple[str, int]:
    """Undo `completion_key`."""
    span_id, _, http_attempt = key[1:].rpartition("/")
    return span_id, int(http_attempt)


def pack_numbers(completion: Completion) -> PackedTokens:
    """Return a completion's numbers with its prompt whole.

    Raises:
        StoreError: token ids that are no 32-bit integers, or log-probabilities that are no numbers.
    """
    # A store is no judge: a choice without log-probabilities is kept as it came.
    choices = [PackedChoice(_int_bytes(c.token_ids), _float_bytes(c.logprobs)) for c in completion.choices]
    return PackedTokens(None, -1, 0, _int_bytes(completion.prompt_token_ids), choices)


def _longest_shared(paths: Sequence[_Path], prompt: bytes) -> tuple[_Path | None, int]:
    """Return the path that shares most whole tokens with `prompt`, and how many bytes that is."""
    best: _Path | None = None
    shared = 0
    for path in reversed(paths):  # a conversation usually goes on after its latest call
        tokens = path.tokens
        if len(tokens) <= shared or (best is not None and tokens[:shared] != prompt[:shared]):
            continue
        length = _common_bytes(tokens, prompt)
        if length > shared:
            best, shared = path, length
    return best, shared


def _common_bytes(left: bytes, right: bytes) -> int:
    """Return the length of the longest common prefix of two int32 strings, in bytes, whole tokens."""
    limit = min(len(left), len(right))
    if left[:limit] == right[:limit]:
        return limit
    equal, differ = 0, limit // _BYTES_PER_TOKEN  # the first `equal` tokens are, the first `differ` are not
    while differ - equal > 1:
        middle = (equal + differ) // 2
        piece = slice(equal * _BYTES_PER_TOKEN, middle * _BYTES_PER_TOKEN)
        if left[piece] == right[piece]:
            equal = middle
        else:
            differ = middle
    return equal * _BYTES_PER_TOKEN


def _int_bytes(values: Sequence[int]) -> bytes:
    try:
        packed = array("i", values)
    except (OverflowError, TypeError) as error:
        raise StoreError(f"token ids must be 32-bit integers: {error}") from error
    if _SWAPPED:
        packed.byteswap()
    return packed.tobytes()


def _float_bytes(values: Sequence[float]) -> bytes:
    try:
        packed = array("f", values)
    except TypeError as error:
        raise StoreError(f"log-probabilities must be numbers: {error}") from error
    if _SWAPPED:
        packed.byteswap()
    return packed.tobytes()


def _ints(blob: bytes) -> array[int]:
    values: array[int] = array("i")
    values.frombytes(blob)
    if _SWAPPED:
        values.byteswap()
    return values


def _floats(blob: bytes) -> list[float]:
    values: array[float] = array("f")
    values.frombytes(blob)
    if _SWAPPED:
        values.byteswap()
    return values.tolist()
