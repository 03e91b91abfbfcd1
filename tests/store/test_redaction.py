"""Keys and tokens never reach the store's files."""

import asyncio
from pathlib import Path

import pytest

from leyden.interfaces import Outcome
from leyden.ownership import current_owner
from leyden.redaction import DEEPEST, REDACTED, Redactor
from leyden.spans import Resource, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_choice, a_completion, a_rollout, a_span

LOOKS_LIKE_A_KEY = "sk-proj-AbCdEfGh0123456789abcdEFGH"
BEARER = "Bearer eyJhbGciOi.J9-canary-token.abcdef"
NAMED = "named-canary-value"
EXACT = "plain words that are a secret"
CANARIES = (LOOKS_LIKE_A_KEY, "J9-canary-token", NAMED, EXACT)


def test_no_canary_reaches_any_byte_of_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    everything = " ".join([LOOKS_LIKE_A_KEY, BEARER, f'"api_key": "{NAMED}"', EXACT])

    async def main() -> bytes:
        async with await SQLiteStore.open(path, redactor=Redactor([EXACT])) as store:
            await store.add_rollouts([a_rollout(task={"prompt": everything, "x-api-key": NAMED}, output=everything)])
            await store.start(["rollout-1"], owner=current_owner(), lease_seconds=60, versions={})
            hidden = {"list": [{"Authorization": NAMED, "text": everything}], everything: 1, "openai_api_key": NAMED}
            await store.add_records(
                [
                    a_span(name=everything, error=everything, attributes=hidden),
                    a_completion(choices=[a_choice(text=everything)], sampling={"stop": everything}, error=everything),
                ]
            )
            late = Outcome(rollout_id="rollout-1", attempt=0, state=RolloutState.LOST, output=everything)
            outcome = Outcome(
                rollout_id="rollout-1", attempt=1, state=RolloutState.FAILED, output=everything, error=everything
            )
            await store.finish([late, outcome])
            await store.put_resources([Resource(kind="prompt", name="p", version=1, created_ns=1, content=everything)])
            await store.put_meta("note", everything)
            while_open = b"".join(file.read_bytes() for file in tmp_path.iterdir())
            [records] = await store.records(["rollout-1"])
            assert records.spans[0].attributes["openai_api_key"] == REDACTED
            assert REDACTED in records.completions[0].choices[0].text
            assert records.completions[0].choices[0].token_ids == [4, 5]
            assert records.completions[0].prompt_token_ids == [1, 2, 3]
        return while_open

    written = asyncio.run(main()) + b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"leyden.outcome.state" in written, "the bytes read should be those of the store"
    assert [canary for canary in CANARIES if canary.encode() in written] == []


def test_keys_of_the_environment_are_taken_out_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_API_KEY", "odd-looking-value")

    async def main() -> object:
        async with await SQLiteStore.open(tmp_path / "store.db") as store:
            await store.add_rollouts([a_rollout(task="my odd-looking-value is")])
            store.redactor.add_secret("rollout-token-1")
            await store.add_rollouts([a_rollout("rollout-2", task="rollout-token-1")])
            return [rollout.task for rollout in await store.rollouts()]

    assert asyncio.run(main()) == [f"my {REDACTED} is", REDACTED]


@pytest.mark.parametrize(
    "text",
    [
        "task-management-for-everyone-in-2026",
        "the bearer of bad news",
        "SELECT authorization FROM permits WHERE api_key IS NULL",
        "ask-me-anything-about-risk-and-desk-work",
        "a sk-short one",
        "runs/leyden-text-to-sql-with-a-long-name",
        "authorization: required before departure",
        "Basic understanding of SQL",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert Redactor().clean({"text": text}) == {"text": text}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("authorization: basic dXNlcjpwYXNzd29yZA==", f"authorization: basic {REDACTED}"),
        (f"key={LOOKS_LIKE_A_KEY}!", f"key={REDACTED}!"),
        (f"{BEARER}\n", f"Bearer {REDACTED}\n"),
        (f"leyden-{'x_-1' * 11}", REDACTED),
        ("hf_abcdefghijklmnopqrstuvwx", REDACTED),
        ("{'api_key': 'abcdefgh12'}", f"{{'api_key': {REDACTED}}}"),
        ("OPENAI_API_KEY=abcdefgh12 python", f"OPENAI_API_KEY={REDACTED} python"),
        ("\x1b[2Jsk-canary-3f9a1c77e2d84b06", "\x1b[2J[redacted]"),
    ],
)
def test_keys_inside_text_are_taken_out(text: str, clean: str) -> None:
    assert Redactor().text(text) == clean


@pytest.mark.parametrize("name", ["authorization", "Authorization", "api_key", "x-api-key", "http.authorization"])
def test_a_value_named_like_a_key_is_taken_out_whole(name: str) -> None:
    assert Redactor().clean({name: ["anything"]}) == {name: REDACTED}
    assert Redactor().clean({name: None}) == {name: None}


def test_whatever_would_be_taken_out_is_suspected_from_its_bytes() -> None:
    redactor = Redactor([EXACT])
    for text in (
        LOOKS_LIKE_A_KEY,
        BEARER,
        f"api-key: {NAMED}",
        f"'Authorization': '{NAMED}'",
        f"x {EXACT} y",
        "ghp_" + "a" * 30,
        "leyden-" + "a" * 43,
    ):
        assert redactor.text(text) != text
        assert redactor.suspects(text.encode()), text
    assert not redactor.suspects(b"task-management-for-everyone: SELECT 1")


def test_short_secrets_are_not_looked_for_and_old_ones_can_be_forgotten() -> None:
    redactor = Redactor(["dummy", "a-rollout-token"])
    assert redactor.text("dummy a-rollout-token") == f"dummy {REDACTED}"
    redactor.remove_secret("a-rollout-token")
    assert redactor.text("a-rollout-token") == "a-rollout-token"
    assert not redactor.suspects(b"a-rollout-token")


def test_a_secret_that_holds_another_is_taken_out_whole() -> None:
    assert Redactor(["secret-one", "secret-one-and-more"]).text("secret-one-and-more") == REDACTED


def test_nested_values_are_cut_at_a_depth() -> None:
    value: object = "bottom"
    for _ in range(DEEPEST + 5):
        value = [value]
    assert "nested too deeply" in str(Redactor().clean(value))
