"""Take keys and tokens out of everything before it is stored.

One idea: most records hold no secret, and that is decided on their encoded bytes with a few substring searches;
only a hit pays for the walk over the values. One trap: token ids are not text and stay as sampled, exactly; a
secret that an agent puts into a *prompt* is taken out of every text but can still be decoded from the ids.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from typing import cast

import msgspec

REDACTED = "[redacted]"

SHORTEST_SECRET = 8
"""Exact secrets shorter than this are not looked for: `dummy` or `EMPTY` would take ordinary words out of texts."""

DEEPEST = 64
"""Values nested deeper than this are cut, which also ends a value that holds itself."""

_KEY_LENGTHS = {
    "sk-": 16, "hf_": 16, "gsk_": 16, "ghp_": 16, "gho_": 16, "github_pat_": 16, "xoxb-": 16, "xoxp-": 16,
    "AIza": 16, "AKIA": 16, "leyden-": 43,
}  # fmt: skip
"""How the keys of well-known services begin, and how many characters follow at least; `leyden-` is the gateway's."""
_KEY_MARKS = (b"sk-", b"hf_", b"gsk_", b"ghp_", b"gho_", b"github_pat_", b"xox", b"AIza", b"AKIA", b"leyden-")
"""One of these stands in whatever `_KEY` finds."""
# The look-behind stands after the literal, so that the search can skip to the literal: `task-` is no key.
_KEY = re.compile("|".join(rf"{p}(?<![A-Za-z0-9]{p})[A-Za-z0-9_\-]{{{least},}}" for p, least in _KEY_LENGTHS.items()))
_AFTER_ESCAPE = re.compile(
    r"((?:\x1b|\\u001b)\[[0-9;?]*[A-Za-z])(?:"
    + "|".join(rf"{p}[A-Za-z0-9_\-]{{{least},}}" for p, least in _KEY_LENGTHS.items())
    + ")"
)
"""A key straight after a terminal's escape sequence, whose last letter `_KEY` takes for the beginning of a word."""
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=\-]{16,}")
# Only a quoted `authorization` counts: the bare word followed by a colon is ordinary prose and ordinary SQL.
_NAMED = re.compile(
    r"(?i)((?:(?:api[-_ ]?key|access[-_]token|secret[-_]key)[\"']?\s*[:=]|authorization[\"']\s*:)\s*)"
    r"(\"[^\"]{8,}\"|'[^']{8,}'|[^\s\"',;}\]]{8,})"
)
_SECRET_NAMES = re.compile(r"(?i)^(?:.*[-_.])?(?:api[-_]?key|authorization|access[-_]token|secret[-_]key)$")

_NAME_MARKS = (b"bearer", b"basic", b"authorization", b"api_key", b"apikey", b"access_token", b"secret_key")
"""One of these stands, after `_FOLDED`, in whatever `_BEARER`, `_NAMED` or `_SECRET_NAMES` finds."""
_FOLDED = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ- ", b"abcdefghijklmnopqrstuvwxyz__")
_BYTES_KEY = re.compile(_KEY.pattern.encode())
_BYTES_AFTER_ESCAPE = re.compile(_AFTER_ESCAPE.pattern.encode())

_SECRET_VARIABLE = re.compile(r"(?:_API_KEY|_TOKEN|_SECRET|_SECRET_KEY|_PASSWORD)$")


class Redactor:
    """Replaces secrets in JSON values by `[redacted]`. Thread-safe.

    Taken out: what looks like an API key or a bearer token, the value of an attribute named like
    `authorization` or `api_key`, and every exact secret it was told of.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._secrets: tuple[str, ...] = ()
        self._secret_bytes: tuple[bytes, ...] = ()
        for secret in secrets:
            self.add_secret(secret)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Redactor:
        """Return a redactor that knows the values of variables named like `OPENAI_API_KEY` or `HF_TOKEN`."""
        variables = os.environ if environment is None else environment
        return cls(value for name, value in variables.items() if _SECRET_VARIABLE.search(name))

    def add_secret(self, secret: str) -> None:
        """Take this exact text out from now on; texts shorter than `SHORTEST_SECRET` are ignored."""
        with self._lock:
            if len(secret) < SHORTEST_SECRET or secret in self._secrets:
                return
            # Longest first: a secret that holds another is replaced whole.
            self._secrets = tuple(sorted((*self._secrets, secret), key=len, reverse=True))
            self._secret_bytes = tuple(known.encode(errors="replace") for known in self._secrets)

    def remove_secret(self, secret: str) -> None:
        """Forget a secret that is no longer valid, such as the token of a finished rollout."""
        with self._lock:
            self._secrets = tuple(known for known in self._secrets if known != secret)
            self._secret_bytes = tuple(known.encode(errors="replace") for known in self._secrets)

    def suspects(self, encoded: bytes) -> bool:
        """Say whether encoded text may hold a secret; False is certain, True is only a reason to look."""
        for secret in self._secret_bytes:
            if secret in encoded:
                return True
        # Plain loops: this runs for every record, and a generator would cost more than its searches.
        for mark in _KEY_MARKS:
            if mark in encoded and (_BYTES_KEY.search(encoded) or _BYTES_AFTER_ESCAPE.search(encoded)):
                return True
        folded = encoded.translate(_FOLDED)
        for mark in _NAME_MARKS:  # noqa: SIM110
            if mark in folded:
                return True
        return False

    def text(self, text: str) -> str:
        """Return `text` without its secrets."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        text = _AFTER_ESCAPE.sub(rf"\1{REDACTED}", _KEY.sub(REDACTED, text))
        text = _BEARER.sub(rf"\1{REDACTED}", text)
        return _NAMED.sub(rf"\1{REDACTED}", text)

    def clean(self, value: object, *, depth: int = 0) -> object:
        """Return `value` as a JSON value without its secrets; what JSON does not know is kept as its `repr`."""
        if isinstance(value, str):
            return self.text(value.encode("utf-8", "replace").decode())
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return value if -(2**63) <= value < 2**63 else str(value)
        if depth > DEEPEST:
            return "[nested too deeply]"
        if isinstance(value, msgspec.Struct):
            tag = value.__struct_config__.tag
            fields = {name: self.clean(getattr(value, name), depth=depth + 1) for name in value.__struct_fields__}
            return {"type": tag, **fields} if tag else fields
        if isinstance(value, Mapping):
            items = cast("Mapping[object, object]", value).items()
            return {self._name(name): self._named(name, item, depth + 1) for name, item in items}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.clean(item, depth=depth + 1) for item in value]
        return self.text(repr(value))

    def _name(self, name: object) -> str:
        return self.text(str(name).encode("utf-8", "replace").decode())

    def _named(self, name: object, value: object, depth: int) -> object:
        if value is not None and isinstance(name, str) and _SECRET_NAMES.match(name):
            return REDACTED
        return self.clean(value, depth=depth)
