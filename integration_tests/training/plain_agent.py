"""An agent that is not the demo: one synchronous function with a plain OpenAI client and temperature 0.

It asks the demo's model, whose task gives it a reward that can be learned within seconds.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "text_to_sql" / "model"
CANARY = "sk-canary-3f9a1c77e2d84b06"
"""The user's key: it must never reach a file of the run, nor the gateway."""

APP = f"""
import functools
import os
import openai

import leyden
from examples.text_to_sql.databases import path, schema
from examples.text_to_sql.reward import reward

@functools.cache
def client():
    return openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="{CANARY}", max_retries=0)

def answer(task):
    messages = [
        {{"role": "system", "content": "writer\\n" + schema(str(path(task["database"])))}},
        {{"role": "user", "content": task["question"]}},
    ]
    reply = client().chat.completions.create(model="theirs", messages=messages, temperature=0, seed=7, max_tokens=48)
    return reply.choices[0].message.content

def solve(task):
    return reward(task, answer(task))

async def solve_async(task):
    return solve(task)

def never_varies(task):
    answer(task)
    return 0.5

def forgets_to_return(task):
    answer(task)

def returns_nan(task):
    answer(task)
    return float("nan")

def raises(task):
    raise LookupError("the app is broken")

def raises_sometimes(task):
    text = answer(task)
    if "WHERE" in text:
        raise LookupError("no filters today")
    return 1.0

def untrained_role_is_down(task):
    answer(task)
    with leyden.role("judge"):
        answer(task)
    return 1.0
"""
