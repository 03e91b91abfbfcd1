"""A stand-in for a closed model and for the strong one that rewrites its instructions, so that the recipe runs offline.

The closed model follows its instructions to the letter: it repeats the last word of a sentence, unless they ask for the
singular or for English. The other one reads what went wrong in what it is shown and adds one line about it. With real
models: their address in OPENAI_BASE_URL, and `Reflection("gpt-5")` in place of `reflect`.
"""

import re
from collections.abc import Mapping, Sequence

from examples.chat_server import Messages
from examples.recipes.shop import GERMAN
from examples.two_policies.desk import GOODS

SINGULAR = "Name the good in the singular."
ENGLISH = "Name the good in English."


def answer(model: str, messages: Messages) -> str:
    """Return what the closed model says."""
    system, sentence = (message["content"] for message in messages)
    word = sentence.split()[-1]
    if "singular" in system and word.removesuffix("s") in GOODS:
        return word.removesuffix("s")
    if "English" in system and word in GERMAN:
        return GOODS[GERMAN.index(word)]
    return word


def reflect(messages: Sequence[Mapping[str, str]]) -> str:
    """Return new instructions: those in the request, and a line about the first thing that went wrong."""
    asked = messages[-1]["content"]
    instructions = asked.split("```")[1].strip()
    for said in re.findall(r"^user: .*?(\S+)$", asked, flags=re.MULTILINE):
        rule = (
            ENGLISH if said in GERMAN else SINGULAR if said.removesuffix("s") in GOODS and said not in GOODS else None
        )
        if rule is not None and rule not in instructions:
            return f"```\n{instructions}\n{rule}\n```"
    return f"```\n{instructions}\n```"
